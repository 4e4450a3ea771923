/* Runs read at the same expenditure: an axis, a value with a slider, and who is ahead there.

   const equal = new fettle.Equal(body, tools, sub, {at: 'seconds:60' or null, change(at), ask(given)});
   equal.refresh(ids)       // asks and shows; equal.line() -> {axis, value, label} for the charts, or null */
(() => {
  'use strict';
  const F = window.fettle,
    NB = F.NB;
  const { scale, plot, figure } = F.intervals;
  const AXES = [
    ['', 'Off'],
    ['seconds', 'Seconds'],
    ['step', 'Steps'],
    ['tokens', 'Tokens'],
    ['joules', 'Joules'],
    ['trainable', 'Trained parameters'],
    ['size', 'Size'],
  ];
  const UNITS = { seconds: 's', step: 'steps', tokens: 'tokens', joules: 'J', trainable: 'parameters', size: 'MB' };
  const FINAL = ['trainable', 'size'];
  const STEPS = 1000,
    SNAP = 14;
  const places = v => (Math.abs(v) >= 100 ? 0 : Math.abs(v) >= 10 ? 1 : 2);
  const round = v => +v.toFixed(places(v));

  /* where the runs are read, on a chart with that axis */
  F.equalLine = (d, { value, label }) => {
    const x = d.X(value);
    if (!d.inX(x)) return;
    const left = x > d.box.l + d.box.w / 2;
    d.add('line', { x1: x, x2: x, y1: d.box.t - 3, y2: d.box.b, class: 'equal' });
    d.text(left ? x - 5 : x + 5, d.box.t + 8, label, 'ink', left ? 'end' : 'start');
  };

  F.Equal = class {
    constructor(body, tools, sub, on) {
      Object.assign(this, { body, sub, on, ids: [], found: null, turn: 0 });
      const [axis, value] = (on.at || '').split(':');
      this.axis = AXES.some(a => a[0] === axis) ? axis : '';
      this.value = +value > 0 ? +value : null;
      this.pick = F.el(
        'select',
        { class: 'ft-in s ft-sel', 'aria-label': 'Expenditure' },
        AXES.map(([v, t]) => F.el('option', { value: v }, t)),
      );
      this.pick.value = this.axis;
      this.pick.addEventListener('change', () => {
        this.axis = this.pick.value;
        this.value = null;
        this.found = null;
        this.tell();
        this.refresh();
      });
      this.list = F.el('datalist', { id: 'ft-equal-marks' });
      this.slider = F.el('input', {
        type: 'range',
        class: 'ft-slim ft-equal-slider',
        min: 0,
        max: STEPS,
        step: 1,
        list: 'ft-equal-marks',
        'aria-label': 'Value at which the runs are read',
      });
      this.number = F.el('input', { type: 'number', class: 'ft-in s num ft-equal-number', min: 0, step: 'any', 'aria-label': 'Value' });
      this.unit = F.el('span', { class: 'mi dim' });
      const soon = F.debounce(() => this.refresh(), 150);
      this.slider.addEventListener('input', () => {
        this.value = this.snap(+this.slider.value);
        this.number.value = round(this.value);
        this.tell();
        soon();
      });
      this.number.addEventListener('change', () => {
        const v = +this.number.value;
        this.number.setAttribute('aria-invalid', !(v > 0));
        if (!(v > 0)) return F.note(this.out, 'bad', 'Give a value above zero.');
        this.value = v;
        this.tell();
        this.refresh();
      });
      this.dial = F.el('span', { class: 'row', style: 'gap:6px' }, this.slider, this.list, this.number, this.unit);
      F.replace(tools, this.dial, this.pick);
      this.out = F.el('div', { class: 'ft-equal-say' });
      this.table = F.el('div', { class: 'ft-scroll' });
      this.marks = F.el('div', { class: 'row wrap ft-equal-marks' });
      F.replace(body, this.marks, this.table, this.out);
      this.idle();
    }
    /* the slider is linear, or logarithmic where the ends are far apart */
    get log() {
      const r = this.found && this.found.range;
      return !!r && r.low > 0 && r.high / r.low > 60;
    }
    at(position) {
      const { low, high } = this.found.range,
        p = position / STEPS;
      return this.log ? low * (high / low) ** p : low + (high - low) * p;
    }
    position(v) {
      const { low, high } = this.found.range;
      if (!(high > low)) return STEPS;
      const p = this.log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
      return Math.round(STEPS * Math.min(1, Math.max(0, p)));
    }
    snap(position) {
      if (!this.found || !this.found.range || !F.finite(this.found.range.low)) return this.value;
      const near = this.found.range.marks
        .map(m => [Math.abs(this.position(m) - position), m])
        .sort((a, b) => a[0] - b[0])[0];
      return near && near[0] <= SNAP ? near[1] : round(this.at(position));
    }
    tell() {
      this.on.change(this.axis ? (this.value ? `${this.axis}:${round(this.value)}` : this.axis) : null, this.axis);
      this.idle();
    }
    /* a run that goes on is read anew every five seconds: each reading tests the scores of all pairs */
    stale() {
      return !!this.axis && performance.now() - (this.asked || 0) > 5000;
    }
    line() {
      return this.axis && F.finite(this.value) ? { axis: this.axis, value: this.value, label: `equal at ${this.amount(this.value)}` } : null;
    }
    amount(v) {
      if (!F.finite(v)) return '';
      if (this.axis === 'tokens' || this.axis === 'trainable') return F.count(v) + (this.axis === 'tokens' ? NB + 'tokens' : '');
      return `${v.toLocaleString('en-US', { maximumFractionDigits: places(v) })}${NB}${UNITS[this.axis]}`;
    }
    idle() {
      this.dial.hidden = !this.axis;
      F.text(this.unit, UNITS[this.axis] || '');
      if (this.axis) return;
      F.text(this.sub, 'every run at the same seconds, tokens or size');
      F.replace(this.table);
      F.replace(this.marks);
      F.replace(this.out, F.el('p', { class: 'ft-none pad' }, 'Choose an expenditure to read the chosen runs at it.'));
    }
    async refresh(ids = this.ids) {
      this.ids = ids;
      if (!this.axis) return this.on.drawn();
      this.asked = performance.now();
      if (!ids.length) {
        this.found = null;
        F.replace(this.table);
        F.replace(this.marks);
        return F.replace(this.out, F.el('p', { class: 'ft-none pad' }, 'Choose runs in the table.'));
      }
      const mine = ++this.turn;
      let found;
      try {
        found = await this.on.ask({ ids, axis: this.axis, value: this.value });
      } catch (e) {
        if (mine === this.turn) F.note(this.out, 'bad', e.text);
        return;
      }
      if (mine === this.turn) this.show(found);
    }
    show(found) {
      if (found.trouble) {
        this.found = null;
        F.replace(this.table);
        F.replace(this.marks);
        F.note(this.out, 'bad', found.trouble);
        return;
      }
      this.found = found;
      const r = found.range,
        able = F.finite(r.low);
      this.dial.hidden = !able;
      if (able) {
        if (!this.value) {
          this.value = found.value;
          this.on.change(`${this.axis}:${round(this.value)}`, null);
        }
        if (document.activeElement !== this.slider) this.slider.value = this.position(this.value);
        this.slider.setAttribute('aria-valuetext', this.amount(this.value));
        if (document.activeElement !== this.number) this.number.value = round(this.value);
        this.number.setAttribute('aria-invalid', false);
        F.replace(
          this.list,
          r.marks.map(m => F.el('option', { value: this.position(m), label: this.amount(m) })),
        );
        F.replace(
          this.marks,
          r.marks.map(m =>
            F.el(
              'button',
              {
                type: 'button',
                class: 'ft-chip',
                'aria-pressed': Math.abs(m - this.value) <= 1e-9 * m,
                title: m === r.default ? (FINAL.includes(this.axis) ? 'Every pipeline has a run' : 'All of them reach it') : null,
                onclick: () => {
                  this.value = m;
                  this.tell();
                  this.refresh();
                },
              },
              this.amount(m),
              m === r.default ? F.el('span', { class: 'n' }, 'all') : null,
            ),
          ),
        );
      } else F.replace(this.marks);
      F.text(this.sub, able ? `${found.how}${found.kind === 'final' ? ', the best run of each pipeline at or below' : ''}` : '');
      F.replace(this.table, this.rows(found));
      const mid = found.rows.some(x => x.mark === 'mid-schedule');
      F.note(this.out, mid ? 'warn' : '', found.text);
      this.on.drawn();
    }
    rows(found) {
      const spent = found.kind === 'spent',
        shown = found.rows.map(r => ({ ...r, metric: found.metric })),
        s = scale(shown),
        signed = v => (v > 0 ? '+' : v < 0 ? '−' : '') + F.fig(Math.abs(v));
      const heads = [
        ['Tier', ''],
        ['Run', ''],
        [found.metric || 'Quality', 'r'],
        ['Interval, 95 %', 'w fo'],
        [spent ? 'Evaluated at' : found.axis === 'size' ? 'Size' : 'Trained', 'r'],
        ...(spent ? [['Age', 'r w']] : []),
        ['To the best', 'r w'],
        ['', 'why'],
      ];
      const row = (r, i) => {
        const read = r.state === 'read',
          b = r.behind;
        return F.el(
          'tr',
          { 'data-run': r.id, 'data-state': r.state },
          F.el('td', { class: 'tier' }, r.tier && (!i || found.rows[i - 1].tier !== r.tier) ? F.el('b', {}, r.tier) : ''),
          F.el(
            'th',
            { scope: 'row' },
            F.el('span', { class: 'row', style: 'gap:6px' }, F.runMark(r.slot, 9), F.el('span', { class: 'name' }, r.name)),
            spent ? null : F.el('span', { class: 'mi dim' }, r.pipeline),
            r.note ? F.el('span', { class: `why only-narrow${r.mark ? ' marked' : ''}` }, r.note) : null,
          ),
          F.el(
            'td',
            { class: 'r num' },
            read
              ? [
                  F.el('b', {}, figure(r.value)),
                  F.finite(r.low) ? F.el('span', { class: 'u' }, ` ± ${((r.high - r.low) / 2).toFixed(Math.abs(r.value) >= 20 ? 1 : 3)}`) : '',
                ]
              : F.el('span', { class: 'dim' }, r.final && F.finite(r.final.value) ? `(${figure(r.final.value)})` : ''),
          ),
          F.el('td', { class: 'w fo' }, F.el('div', { class: 'ft-chart' }, plot(read ? shown[i] : { ...shown[i], value: null }, s, null))),
          F.el('td', { class: 'r num' }, read ? this.amount(r.spent) : F.el('span', { class: 'dim' }, r.state)),
          ...(spent ? [F.el('td', { class: 'r num w' }, read ? this.amount(r.age) : '')] : []),
          F.el(
            'td',
            { class: 'r num w', title: b ? `${signed(b.low)} to ${signed(b.high)} (95 %), n = ${b.n}` : null },
            b ? [signed(b.difference), F.el('span', { class: 'u' }, b.p < 0.001 ? ' p < 0.001' : ` p = ${b.p.toPrecision(2)}`)] : '',
          ),
          F.el('td', { class: `why${r.mark ? ' marked' : ''}` }, r.mark ? F.icon('warn', 's') : null, r.note || ''),
        );
      };
      return F.el(
        'table',
        { class: 'ft-table ft-equal' },
        F.el('thead', {}, F.el('tr', {}, heads.map(([t, c]) => F.el('th', { scope: 'col', class: c }, t)))),
        F.el('tbody', {}, found.rows.map(row)),
      );
    }
  };
})();
