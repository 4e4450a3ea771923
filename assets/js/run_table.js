/* The run table: rows stay the same nodes while their figures change, so scroll, focus and what is being typed survive.

   const table = new fettle.RunTable(node, {sort, choose, star, edit, page, open});
   table.update({rows, total, page, pages, metric}, {sort, chosen: [ids]}) */
(() => {
  'use strict';
  const F = window.fettle,
    NB = F.NB;
  const { scale, plot, figure, WIDTH } = F.intervals;

  const COLUMNS = [
    { id: 'pick', cls: 'pick' },
    { id: 'star', cls: 'w' },
    { id: 'name', name: 'Run', sort: 'name' },
    { id: 'pipe', name: 'Pipeline', cls: 'w' },
    { id: 'value', name: 'Quality', sort: 'value' },
    { id: 'interval', name: 'Interval, 95 %', cls: 'w fo' },
    { id: 'size', name: 'Size', unit: 'MB', sort: 'size', r: true },
    { id: 'speed', name: 'Speed', sort: 'speed', r: true, cls: 'w' },
    { id: 'peak', name: 'Peak', unit: 'GB', sort: 'peak', r: true, cls: 'w' },
    { id: 'ratio', name: '÷ forecast', sort: 'ratio', r: true, cls: 'w dim', title: 'Measured peak memory over its forecast' },
    { id: 'time', name: 'Time', sort: 'seconds', r: true, cls: 'w' },
    { id: 'seeds', name: 'Seed', r: true, cls: 'w', title: 'Seed, or the number of runs that differ in nothing else' },
    { id: 'tags', name: 'Tags, note', cls: 'w' },
    { id: 'state', name: 'State', cls: 'w', sort: 'status' },
  ];
  F.RunTable = class {
    constructor(node, on) {
      Object.assign(this, { node, on, rows: new Map(), chosen: new Set(), cells: new WeakMap() });
      this.head = F.el('tr');
      this.body = F.el('tbody');
      this.all = F.el('input', {
        type: 'checkbox',
        class: 'ft-check',
        'aria-label': 'Choose all on this page',
        onchange: () => on.choose([...this.order], this.all.checked),
      });
      this.axis = F.svg('svg', { width: WIDTH, height: 14, viewBox: `0 0 ${WIDTH} 14`, 'aria-hidden': 'true' });
      for (const c of COLUMNS) this.head.append(this.heading(c));
      this.foot = F.el('div', { class: 'ft-tierline' });
      node.append(
        F.el(
          'div',
          { class: 'ft-scroll' },
          F.el('table', { class: 'ft-table ft-runs' }, F.el('thead', {}, this.head), this.body),
        ),
        this.foot,
      );
      this.body.addEventListener('click', e => this.click(e));
      this.order = [];
    }
    heading(c) {
      if (c.id === 'pick') return F.el('th', { scope: 'col', class: 'pick' }, this.all);
      if (c.id === 'star') return F.el('th', { scope: 'col', class: 'w' }, F.el('span', { class: 'vh' }, 'Star'));
      if (c.id === 'interval')
        return F.el(
          'th',
          { scope: 'col', class: 'w fo' },
          F.el('span', { class: 'vh' }, c.name),
          F.el('div', { class: 'ft-chart' }, this.axis),
        );
      const unit = F.el('span', { class: 'u', 'data-unit': c.id }, c.unit ? ' ' + c.unit : '');
      const th = F.el('th', {
        scope: 'col',
        class: `${c.r ? 'r ' : ''}${(c.cls || '').replace('dim', '')}`,
        title: c.title,
        'data-col': c.id,
      });
      th.append(
        c.sort
          ? F.el(
              'button',
              { type: 'button', class: 'sorter', 'data-sort': c.sort, onclick: () => this.on.sort(c.sort) },
              c.name,
              unit,
              F.el('span', { class: 'way', 'aria-hidden': 'true' }),
            )
          : F.el('span', {}, c.name, unit),
      );
      return th;
    }
    /* writes a cell only when what it shows has changed */
    set(row, id, key, make) {
      if (row.keys[id] === key) return;
      row.keys[id] = key;
      F.replace(row.cell[id], make());
    }
    row(id) {
      const tr = F.el('tr', { 'data-run': id }),
        cell = {};
      for (const c of COLUMNS)
        tr.append(
          (cell[c.id] = F.el(c.id === 'name' ? 'th' : 'td', {
            scope: c.id === 'name' ? 'row' : null,
            class: `${c.r ? 'r num ' : ''}${c.cls || ''} c-${c.id}`,
          })),
        );
      const row = { tr, cell, keys: {}, id };
      row.check = F.el('input', { type: 'checkbox', class: 'ft-check', onchange: () => this.on.choose([id], row.check.checked) });
      cell.pick.append(row.check);
      return row;
    }
    update(data, state) {
      this.chosen = new Set(state.chosen);
      const s = scale(data.rows),
        base = this.base(data.rows, s);
      this.header(data, state, s);
      const seen = new Set();
      data.rows.forEach((r, i) => {
        seen.add(r.id);
        let row = this.rows.get(r.id);
        if (!row) this.rows.set(r.id, (row = this.row(r.id)));
        row.data = r;
        this.paint(row, r, s, base);
        const at = this.body.children[i];
        if (at !== row.tr) this.body.insertBefore(row.tr, at || null);
      });
      for (const [id, row] of this.rows)
        if (!seen.has(id)) {
          row.tr.remove();
          this.rows.delete(id);
        }
      this.order = data.rows.map(r => r.id);
      const n = this.order.filter(id => this.chosen.has(id)).length;
      this.all.checked = n > 0 && n === this.order.length;
      this.all.indeterminate = n > 0 && n < this.order.length;
      this.footer(data, base);
    }
    base(rows, s) {
      const of = rows.filter(r => s && r.metric === s.metric && F.finite(r.base)),
        same = new Set(of.map(r => r.base.toFixed(6)));
      const on = new Set(of.map(r => `${r.model} ${r.data}`));
      return same.size === 1 && on.size === 1 ? of[0].base : null;
    }
    header(data, state, s) {
      const column = state.sort.replace('-', ''),
        down = state.sort.startsWith('-');
      for (const th of this.head.children) {
        const b = th.querySelector('[data-sort]');
        if (!b) continue;
        const on = b.dataset.sort === column;
        on ? th.setAttribute('aria-sort', down ? 'descending' : 'ascending') : th.removeAttribute('aria-sort');
        F.text(b.querySelector('.way'), on ? (down ? NB + '▾' : NB + '▴') : '');
      }
      const metrics = new Set(data.rows.filter(r => F.finite(r.value)).map(r => r.metric));
      this.one = metrics.size === 1;
      F.text(this.head.querySelector('[data-unit="value"]'), this.one ? ' ' + [...metrics][0] : '');
      const units = new Set(data.rows.filter(r => F.finite(r.speed)).map(r => r.speed_unit));
      this.oneUnit = units.size <= 1;
      F.text(this.head.querySelector('[data-unit="speed"]'), units.size === 1 ? ' ' + [...units][0] : '');
      const key = JSON.stringify([s, this.one]);
      if (key === this.axisKey) return;
      this.axisKey = key;
      this.axis.replaceChildren(
        ...(s
          ? s.ticks.map(t =>
              F.svg(
                'text',
                { x: 6 + ((t - s.a) / (s.b - s.a)) * (WIDTH - 12), y: 11, 'text-anchor': 'middle' },
                t.toFixed(s.places),
              ),
            )
          : []),
      );
    }
    paint(row, r, s, base) {
      const on = this.chosen.has(r.id),
        k = F.run(r.slot);
      if (row.check.checked !== on) row.check.checked = on;
      F.attr(row.check, 'aria-label', `Choose ${r.name}`);
      row.check.style.setProperty('--c', k.css);
      F.attr(row.tr, 'aria-selected', on);
      this.set(row, 'star', String(r.starred), () =>
        F.el(
          'button',
          {
            type: 'button',
            class: 'ft-btn icon star',
            'aria-pressed': r.starred,
            'aria-label': `${r.starred ? 'Unstar' : 'Star'} ${r.name}`,
            'data-do': 'star',
          },
          F.icon(r.starred ? 'starf' : 'star', 's' + (r.starred ? '' : ' dim')),
        ),
      );
      this.set(row, 'name', JSON.stringify([r.name, r.pipeline, r.status, r.words, this.narrow]), () => [
        F.el('a', { href: `/live?run=${r.id}`, title: 'Open on the Live page' }, r.name),
        F.el('div', { class: 'pipe only-narrow' }, this.pipe(r, false), ' ', F.state(r.status, r.words)),
      ]);
      this.set(row, 'pipe', JSON.stringify(r.pipeline), () => F.el('div', { class: 'pipe' }, this.pipe(r, true)));
      this.set(row, 'value', JSON.stringify([r.value, r.low, r.high, r.metric, this.one]), () =>
        F.finite(r.value)
          ? [
              F.el('b', {}, figure(r.value)),
              F.finite(r.low) && F.finite(r.high)
                ? F.el('span', { class: 'u' }, ` ± ${((r.high - r.low) / 2).toFixed(Math.abs(r.value) >= 20 ? 1 : 3)}`)
                : '',
              this.one ? '' : F.el('span', { class: 'u' }, NB + r.metric),
            ]
          : F.el('span', { class: 'dim' }, 'none yet'),
      );
      this.set(row, 'interval', JSON.stringify([r.value, r.low, r.high, r.metric, s, base]), () =>
        F.el('div', { class: 'ft-chart' }, plot(r, s, base)),
      );
      this.set(row, 'size', String(r.size), () => (F.finite(r.size) ? F.fig(r.size / 1e6) : ''));
      this.set(row, 'speed', `${r.speed}${r.speed_unit}${this.oneUnit}`, () =>
        F.finite(r.speed) ? [F.fig(r.speed), this.oneUnit ? '' : F.el('span', { class: 'u' }, NB + r.speed_unit)] : '',
      );
      this.set(row, 'peak', String(r.peak), () => (F.finite(r.peak) ? F.fixed(r.peak / 1e9, 2) : ''));
      this.set(row, 'ratio', String(r.ratio), () => (F.finite(r.ratio) ? F.fixed(r.ratio, 2) : ''));
      this.set(row, 'time', String(Math.round(r.seconds ?? -1)), () => (F.finite(r.seconds) ? F.clock(r.seconds) : ''));
      this.set(row, 'seeds', JSON.stringify([r.seeds, r.seed]), () =>
        r.seeds.length ? `${r.seeds.length}${NB}${r.seeds.length === 1 ? 'seed' : 'seeds'}` : String(r.seed),
      );
      if (!row.editing)
        this.set(row, 'tags', JSON.stringify([r.tags, r.note]), () =>
          F.el(
            'button',
            { type: 'button', class: 'tagger', 'data-do': 'edit', 'aria-label': `Edit tags and note of ${r.name}` },
            r.tags.map(t => F.el('span', { class: 'ft-tag' }, t)),
            r.note ? F.el('span', { class: 'mut note' }, r.note) : '',
            !r.tags.length && !r.note ? F.icon('edit', 's') : '',
          ),
        );
      this.set(row, 'state', JSON.stringify([r.status, r.words]), () => F.state(r.status, r.words));
      row.cell.state.title = r.why || '';
    }
    pipe(r, icons) {
      if (!r.pipeline.length) return [F.el('span', { class: 'dim' }, 'evaluation only')];
      return r.pipeline.flatMap((p, i) => [
        i ? F.el('i') : null,
        F.el('span', {}, icons ? F.family(p.family, 's') : null, p.text),
      ]);
    }
    footer(data, base) {
      const first = base === null ? null : data.rows.find(r => r.base === base),
        key = JSON.stringify([data.total, data.page, data.pages, base, first && [first.model, first.data, first.metric]]);
      if (key === this.footKey) return;
      this.footKey = key;
      const turn = (words, icon, page, off) =>
        F.el(
          'button',
          {
            type: 'button',
            class: 'ft-btn icon',
            'aria-label': words,
            title: words,
            disabled: off,
            onclick: () => this.on.page(page),
          },
          F.icon(icon),
        );
      F.replace(
        this.foot,
        data.pages > 1
          ? F.el(
              'span',
              { class: 'row num', style: 'gap:2px' },
              turn('Previous page', 'left', data.page - 1, data.page <= 1),
              `${data.page} of ${data.pages}`,
              turn('Next page', 'right', data.page + 1, data.page >= data.pages),
            )
          : null,
        F.el('span', { class: 'grow' }),
        base !== null && first
          ? F.el(
              'span',
              {},
              `Base: ${first.model} on ${first.data}, `,
              F.el('span', { class: 'num' }, figure(base)),
              ` ${first.metric}`,
            )
          : null,
      );
      this.foot.hidden = !this.foot.textContent;
    }
    click(e) {
      const tr = e.target.closest('tr[data-run]'),
        row = tr && this.rows.get(+tr.dataset.run);
      if (!row) return;
      const what = e.target.closest('[data-do]')?.dataset.do;
      if (what === 'star') return this.on.star(row.id, !row.data.starred);
      if (what === 'edit') return this.edit(row);
      if (!what && !e.target.closest('a, button, input, label') && !String(getSelection()))
        this.on.choose([row.id], !this.chosen.has(row.id));
    }
    /* tags and note in place: Enter keeps them, Escape does not */
    edit(row) {
      const r = row.data,
        tags = F.el('input', { class: 'ft-in s', 'aria-label': 'Tags, divided by commas', placeholder: 'tags' }),
        note = F.el('input', { class: 'ft-in s', 'aria-label': 'Note', placeholder: 'note' });
      tags.value = r.tags.join(', ');
      note.value = r.note;
      row.editing = true;
      const done = async keep => {
        if (!row.editing) return;
        row.editing = false;
        row.keys.tags = null;
        if (keep) {
          r.tags = [
            ...new Set(
              tags.value
                .split(',')
                .map(t => t.trim())
                .filter(Boolean),
            ),
          ].sort();
          r.note = note.value.trim();
          if (!(await this.on.edit(row.id, r.tags, r.note))) {
            row.editing = true;
            return;
          }
        }
        const own = box.contains(document.activeElement);
        this.on.again();
        if (own) row.cell.tags.querySelector('button')?.focus();
      };
      const box = F.el('span', { class: 'row editor' }, tags, note);
      box.addEventListener('keydown', e => {
        if (e.key === 'Enter') {
          e.preventDefault();
          done(true);
        } else if (e.key === 'Escape') done(false);
      });
      box.addEventListener('focusout', e => {
        if (!box.contains(e.relatedTarget)) done(true);
      });
      F.replace(row.cell.tags, box);
      tags.focus();
      tags.select();
    }
  };
})();
