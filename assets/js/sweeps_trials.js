/* The table of trials; rows are changed in place, so that a selection or a scroll stays.

   const table = new fettle.SweepTrials(body, tools, sub); table.show(sweep) */
(() => {
  'use strict';
  const F = window.fettle;
  const GLYPH = {
    complete: 'finished',
    pruned: 'stopped',
    pruning: 'stopped',
    infeasible: 'lost',
    failed: 'failed',
    stopped: 'stopped',
    running: 'running',
    queued: 'queued',
  };
  const WORD = {
    complete: 'Complete',
    pruned: 'Pruned',
    pruning: 'Being pruned',
    infeasible: 'Does not fit',
    failed: 'Failed',
    stopped: 'Stopped',
    running: 'Running',
    queued: 'Queued',
  };
  F.sweepWords = WORD;
  const shown = v =>
    typeof v === 'number' && !Number.isInteger(v)
      ? F.fig(v, 3)
      : typeof v === 'object'
        ? Array.isArray(v)
          ? v.map(s => (typeof s === 'string' ? s : s.method)).join(' + ')
          : v.method || JSON.stringify(v)
        : String(v);

  F.SweepTrials = class {
    constructor(body, tools, sub) {
      Object.assign(this, { body, tools, sub, rows: new Map(), sort: 'number' });
      this.pick = F.el('select', { class: 'ft-in s ft-sel', 'aria-label': 'Order of the trials' });
      this.pick.addEventListener('change', () => {
        this.sort = this.pick.value;
        this.show(this.sweep);
      });
      F.replace(
        tools,
        F.el('button', { type: 'button', class: 'ft-btn quiet', onclick: () => this.csv() }, F.icon('down'), 'CSV'),
        this.pick,
      );
      this.tbody = F.el('tbody');
      this.thead = F.el('thead');
      F.replace(
        body,
        F.el('div', { class: 'ft-scroll sw-trials' }, F.el('table', { class: 'ft-table' }, this.thead, this.tbody)),
      );
    }
    columns() {
      return this.sweep.parameters.length ? this.sweep.parameters.map(p => p.path) : ['pipeline'];
    }
    param(t, path) {
      return path === 'pipeline' && t.label ? t.label : path in t.params ? shown(t.params[path]) : '';
    }
    show(sweep) {
      const other = this.sweep?.id !== sweep.id;
      this.sweep = sweep;
      const head = JSON.stringify([sweep.id, this.columns(), sweep.objectives]);
      if (head !== this.head) {
        this.head = head;
        F.replace(
          this.thead,
          F.el(
            'tr',
            {},
            ['Trial', 'State', ...this.columns()].map(n => F.el('th', { scope: 'col' }, n)),
            sweep.objectives.map(o => F.el('th', { scope: 'col', class: 'r' }, F.sweepWord(o.name))),
            sweep.plan.on ? F.el('th', { scope: 'col' }, 'Where') : null,
            F.el('th', { scope: 'col' }, 'Run'),
            F.el('th', { scope: 'col' }, 'Why'),
          ),
        );
        F.replace(
          this.pick,
          F.el('option', { value: 'number' }, 'newest first'),
          sweep.objectives.map((o, i) => F.el('option', { value: String(i) }, `best ${F.sweepWord(o.name).toLowerCase()}`)),
        );
        this.pick.value = this.sort = 'number';
      }
      if (other) {
        this.rows.clear();
        this.tbody.replaceChildren();
      }
      F.text(this.sub, `${sweep.trials.length} of ${sweep.plan.trials}`);
      const front = new Set(sweep.front);
      const i = Number(this.sort),
        sign = this.sort === 'number' ? 0 : sweep.objectives[i].direction === 'minimize' ? 1 : -1;
      const value = t => (t.state === 'complete' && t.values && F.finite(t.values[i]) ? sign * t.values[i] : Infinity);
      const order = [...sweep.trials].sort((a, b) => (sign ? value(a) - value(b) || a.number - b.number : b.number - a.number));
      order.forEach((t, at) => {
        const mark = JSON.stringify([t, front.has(t.number)]);
        let row = this.rows.get(t.number);
        if (!row || row.mark !== mark) {
          const made = { node: this.row(t, front.has(t.number)), mark };
          row?.node.replaceWith(made.node);
          this.rows.set(t.number, (row = made));
        }
        if (this.tbody.children[at] !== row.node) this.tbody.insertBefore(row.node, this.tbody.children[at] || null);
      });
      this.order = order;
    }
    row(t, best) {
      const part = F.finite(t.progress) && t.state === 'running' ? ` ${Math.round(100 * t.progress)}${F.NB}%` : '';
      const poor = t.state !== 'complete' && t.state !== 'running';
      return F.el(
        'tr',
        { class: poor ? 'cut' : best ? 'best' : null, 'data-trial': t.number },
        F.el(
          'td',
          { class: 'num' },
          String(t.number + 1),
          best
            ? F.el(
                'span',
                { class: 'sw-star', title: 'No trial is better in every objective' },
                F.icon('check'),
                F.el('span', { class: 'sr' }, ' on the front'),
              )
            : null,
        ),
        F.el(
          'td',
          {},
          F.state(GLYPH[t.state] || t.state, WORD[t.state] + part),
          t.attempt > 1 ? F.el('span', { class: 'dim sm' }, ` attempt ${t.attempt}`) : null,
        ),
        this.columns().map(path => F.el('td', { class: 'num' }, this.param(t, path))),
        this.sweep.objectives.map((o, i) =>
          F.el('td', { class: 'r num' }, t.values && F.finite(t.values[i]) ? F.sweepFigure(o, t.values[i]) : ''),
        ),
        this.sweep.plan.on ? F.el('td', { class: 'dim' }, t.node || '') : null,
        F.el('td', {}, t.run ? F.el('a', { href: `/live?run=${t.run}` }, t.name) : ''),
        F.el('td', { class: 'why', title: t.message || null }, t.message || ''),
      );
    }
    csv() {
      const s = this.sweep;
      F.csv(
        `${s.name}.csv`,
        [
          { name: 'trial' },
          { name: 'state' },
          ...this.columns().map(name => ({ name })),
          ...s.objectives.map(o => ({ name: o.name, unit: o.unit || null })),
          { name: 'run' },
          { name: 'why' },
        ],
        s.trials.map(t => [
          t.number + 1,
          t.state,
          ...this.columns().map(p =>
            p === 'pipeline' && t.label ? t.label : typeof t.params[p] === 'object' ? JSON.stringify(t.params[p]) : t.params[p],
          ),
          ...s.objectives.map((_, i) => t.values?.[i]),
          t.name,
          t.message,
        ]),
      );
    }
  };
})();
