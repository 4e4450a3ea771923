/* Curves of several runs over one axis. Raw points thin, the smoothed line over them, evaluations with whiskers.

   const overlay = new fettle.Overlay(body, tools, sub, {ask, state, change});
   overlay.show(answer)     // answer of compare(): {unit, name, runs: [{id, name, slot, x, y, evaluations, members}], base} */
(() => {
  'use strict';
  const F = window.fettle;
  const AXES = [
    ['step', 'step'],
    ['tokens', 'tokens'],
    ['seconds', 'seconds'],
    ['joules', 'joules'],
  ];
  const MOST = 10;

  F.Overlay = class {
    constructor(body, tools, sub, on) {
      Object.assign(this, { body, tools, sub, on, runs: [], answer: null });
      this.plot = F.el('div', { class: 'ft-chart ft-tall' });
      this.side = F.el('div', { class: 'ft-scroll ft-astable', hidden: true });
      this.say = F.el('p', { class: 'ft-none', hidden: true });
      this.live = F.el('p', { class: 'vh' });
      this.key = F.el('p', { class: 'ft-key only-narrow' });
      F.replace(body, this.plot, this.key, this.side, this.say);
      this.x = this.segment('Horizontal axis', AXES, on.state.x, v => on.change({ x: v }));
      this.what = F.el('select', { class: 'ft-in s ft-sel', 'aria-label': 'Quantity' });
      this.what.addEventListener('change', () => on.change({ y: this.what.value }));
      this.smooth = F.el('input', {
        type: 'range',
        class: 'ft-slim',
        min: 0,
        max: 0.99,
        step: 0.01,
        'aria-label': 'Smoothing',
        title: 'Smoothing',
      });
      this.smooth.value = on.state.smooth;
      this.smooth.addEventListener('input', () => {
        on.state.smooth = +this.smooth.value;
        this.draw();
      });
      this.smooth.addEventListener('change', () => on.change({ smooth: +this.smooth.value }));
      this.button = F.el(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon',
          'aria-label': 'Show as table',
          title: 'Show as table',
          'aria-pressed': false,
          onclick: () => this.table(this.side.hidden),
        },
        F.icon('table'),
      );
      F.replace(
        tools,
        F.el('label', { class: 'row only-wide mi dim', style: 'gap:4px' }, 'smooth', this.smooth),
        this.what,
        this.x,
        this.button,
        F.el(
          'button',
          {
            type: 'button',
            class: 'ft-btn icon',
            'aria-label': 'Download CSV',
            title: 'Download CSV',
            onclick: () => this.csv(),
          },
          F.icon('down'),
        ),
      );
    }
    segment(label, options, value, pick) {
      const box = F.el(
        'span',
        { class: 'ft-seg', role: 'group', 'aria-label': label },
        options.map(([v, t]) =>
          F.el(
            'button',
            {
              type: 'button',
              'data-v': v,
              'aria-pressed': v === value,
              onclick: () => {
                for (const b of box.children) b.setAttribute('aria-pressed', b.dataset.v === v);
                pick(v);
              },
            },
            t,
          ),
        ),
      );
      return box;
    }
    get axis() {
      return this.on.state.x;
    }
    show(answer) {
      this.answer = answer;
      this.runs = answer.runs;
      const options = answer.series.map(s => F.el('option', { value: s.id }, s.name));
      if (this.what.dataset.key !== JSON.stringify(answer.series)) {
        F.replace(this.what, options);
        this.what.dataset.key = JSON.stringify(answer.series);
      }
      this.what.value = answer.y;
      this.what.hidden = answer.series.length < 2;
      for (const b of this.x.children) b.setAttribute('aria-pressed', b.dataset.v === this.axis);
      const drawn = this.runs.filter(r => r.x.length || r.evaluations.length);
      this.say.hidden = drawn.length > 0;
      if (!drawn.length)
        F.text(
          this.say,
          this.axis === 'joules'
            ? 'No energy counter here: these runs have no joules. Choose another axis.'
            : 'These runs have recorded no such curve yet.',
        );
      this.plot.hidden = !drawn.length || !this.side.hidden;
      const bands = this.runs.some(r => r.band);
      F.replace(
        this.key,
        this.runs.slice(0, MOST).map(r => F.el('span', {}, F.runMark(r.slot, 9), r.name)),
      );
      F.text(this.sub, `${answer.name}${answer.unit ? ', ' + answer.unit : ''}${bands ? '; bands are the range of seeds' : ''}`);
      if (drawn.length) this.draw();
      if (!this.side.hidden) this.table(true);
    }
    smoothed(r) {
      const k = this.on.state.smooth;
      if (!k) return r.y;
      const mean = F.ema(k);
      return r.y.map(v => mean.next(v));
    }
    draw() {
      if (!this.answer || !this.runs.length) return;
      const clock = this.axis === 'seconds',
        keys = JSON.stringify(this.runs.map(r => [r.id, !!r.band]));
      if (!this.chart) {
        this.chart = new F.Chart(this.plot, {
          id: 'compare',
          aria: 'Curves of the chosen runs',
          clock,
          traces: () => this.traces(),
          layout: () => this.layout(),
          auto: c => this.range(c),
          overlay: d => this.over(d),
        });
        this.chart.axis = this.axis;
      }
      this.fill();
      this.plot.setAttribute('aria-label', `${this.answer.name} of ${this.runs.map(r => r.name).join(', ')} by ${this.axis}`);
      const changed = keys !== this.keys || this.chart.axis !== this.axis || this.shown !== this.answer.y;
      if (this.shown !== undefined && this.shown !== this.answer.y) this.chart.ranges = {};
      this.keys = keys;
      this.shown = this.answer.y;
      if (changed) this.chart.rebuild({ clock, axis: this.axis });
      else this.chart.flush();
    }
    fill() {
      const c = this.chart;
      for (const r of this.runs) {
        const line = this.smoothed(r);
        if (r.band)
          c.put(`band${r.id}`, [...r.band.x, ...[...r.band.x].reverse()], [...r.band.high, ...[...r.band.low].reverse()], {});
        c.put(`raw${r.id}`, r.x, this.on.state.smooth ? r.y : []);
        if (!this.on.state.smooth) c.put(`raw${r.id}`, [], []);
        c.put(`line${r.id}`, r.x, line);
        const e = r.evaluations.filter(v => F.finite(v.x));
        c.put(
          `eval${r.id}`,
          e.map(v => v.x),
          e.map(v => v.y),
          {
            'error_y.array': e.map(v => (F.finite(v.high) ? v.high - v.y : 0)),
            'error_y.arrayminus': e.map(v => (F.finite(v.low) ? v.y - v.low : 0)),
          },
        );
      }
    }
    traces() {
      const many = this.runs.length > MOST,
        out = [];
      for (const r of this.runs) {
        const k = F.run(r.slot),
          color = many && !r.front ? F.token('line-strong') : k.color,
          dash = many && !r.front ? 'solid' : k.dash;
        if (r.band)
          out.push({ key: `band${r.id}`, mode: 'none', fill: 'toself', fillcolor: F.alpha(color, 0.13), hoverinfo: 'skip' });
        out.push({
          key: `raw${r.id}`,
          mode: 'lines',
          line: { color: F.alpha(color, 0.28), width: 1 },
          hoverinfo: 'skip',
          connectgaps: false,
        });
        out.push({
          key: `line${r.id}`,
          name: r.name,
          mode: 'lines',
          line: { color, width: 2, dash },
          hovertemplate: '%{y:.4~g}',
          connectgaps: false,
        });
        out.push({
          key: `eval${r.id}`,
          name: r.name,
          mode: r.x.length ? 'markers' : 'lines+markers',
          line: { color, width: 1.75, dash },
          marker: { color, symbol: k.symbol, size: 7 },
          hovertemplate: '%{y:.4~g}',
          error_y: { type: 'data', symmetric: false, color, thickness: 1.25, width: 3 },
        });
      }
      return out;
    }
    layout() {
      const right = this.wide() ? 120 : 14;
      return { margin: { l: 44, r: right, t: 14, b: 26 }, yaxis: { tickformat: '~g' } };
    }
    wide() {
      return this.plot.clientWidth > 560;
    }
    range() {
      const xs = [],
        ys = [];
      for (const r of this.runs) {
        for (const e of r.evaluations) {
          if (F.finite(e.x)) xs.push(e.x);
          ys.push(e.y, F.finite(e.low) ? e.low : e.y, F.finite(e.high) ? e.high : e.y);
        }
        if (!r.x.length) continue;
        xs.push(r.x[0], r.x[r.x.length - 1]);
        /* the fall of the first steps would squeeze all that follows into a line */
        const v = this.smoothed(r).filter(F.finite),
          rest = v.slice(Math.floor(v.length * 0.04));
        ys.push(Math.min(...rest), F.quantile(rest, 0.98));
      }
      if (F.finite(this.answer.base)) ys.push(this.answer.base);
      const y = ys.filter(F.finite);
      if (!xs.length || !y.length) return {};
      const [lo, hi] = F.nice(Math.min(...y), Math.max(...y), 0.05),
        x1 = Math.max(...xs);
      return { x: [Math.min(0, ...xs), x1 + (x1 || 1) * 0.015], y: [lo, hi] };
    }
    over(d) {
      if (F.finite(this.answer.base)) d.ref(this.answer.base, `base ${F.fig(this.answer.base, 4)}`, this.wide() ? 'r' : 'l');
      const equal = this.on.state.equal;
      if (equal && equal.axis === this.axis) F.equalLine(d, equal);
      if (this.runs.length > MOST) return;
      const ends = this.runs
        .map(r => {
          const e = r.evaluations[r.evaluations.length - 1],
            line = this.smoothed(r);
          let i = line.length - 1;
          while (i >= 0 && !F.finite(line[i])) i--;
          return e && (i < 0 || e.x >= r.x[i]) ? { x: e.x, y: e.y, r } : i >= 0 ? { x: r.x[i], y: line[i], r } : null;
        })
        .filter(Boolean);
      if (this.wide()) this.labels(d, ends);
    }
    /* one column at the right edge, 13 px apart, with a leader to where the line ends and the run's marker */
    labels(d, ends) {
      const b = d.box,
        list = ends
          .map(e => ({ ...e, p: d.Y(e.y), px: Math.min(d.X(e.x), b.r) }))
          .filter(e => e.p > b.t - 30 && e.p < b.b + 30 && e.px > b.l)
          .sort((a, c) => a.p - c.p);
      for (const e of list) e.q = e.p;
      for (let k = 0; k < 60; k++) {
        let moved = false;
        for (let i = 1; i < list.length; i++) {
          const gap = list[i].q - list[i - 1].q;
          if (gap < 12.9) {
            list[i].q += (13 - gap) / 2;
            list[i - 1].q -= (13 - gap) / 2;
            moved = true;
          }
        }
        if (!moved) break;
      }
      const over = list.length ? Math.max(0, list[list.length - 1].q - (b.b - 2)) : 0,
        under = list.length ? Math.max(0, b.t + 4 - list[0].q) : 0;
      for (const e of list) {
        e.q += under - over;
        const k = F.run(e.r.slot),
          x = b.r + 12;
        d.add('path', { d: `M${e.px + 3} ${e.p}L${x - 5} ${e.q}`, style: `stroke:${k.css};fill:none;opacity:.55` });
        d.add('path', { d: F.PATHS[k.symbol], transform: `translate(${x} ${e.q}) scale(.72)`, style: `fill:${k.css}` });
        d.text(x + 8, e.q + 3.5, e.r.name.length > 17 ? e.r.name.slice(0, 16) + '…' : e.r.name, 'ink');
      }
    }
    columns() {
      return [
        { name: 'Run' },
        { name: this.axis, r: true, f: v => (this.axis === 'seconds' ? F.clock(v) : F.fig(v, 4)) },
        { name: this.answer.name, unit: this.answer.unit, r: true, f: v => F.fig(v, 4) },
        { name: 'from', r: true, f: v => F.fig(v, 4) },
        { name: 'to', r: true, f: v => F.fig(v, 4) },
      ];
    }
    rows(every) {
      const out = [];
      for (const r of this.runs) {
        const n = every ? r.x.length : Math.min(r.x.length, 12),
          line = this.smoothed(r);
        for (let i = 0; i < n; i++) {
          const at = every ? i : Math.round((i * (r.x.length - 1)) / Math.max(1, n - 1));
          out.push([r.name, r.x[at], every ? r.y[at] : line[at], null, null]);
        }
        for (const e of r.evaluations) out.push([r.name, e.x, e.y, e.low, e.high]);
      }
      return out;
    }
    table(on) {
      this.side.hidden = !on;
      this.button.setAttribute('aria-pressed', on);
      this.plot.hidden = on || !this.say.hidden;
      if (on && this.answer) F.replace(this.side, F.table(this.columns(), this.rows(false)));
      else this.draw();
    }
    csv() {
      if (this.answer) F.csv('curves.csv', this.columns(), this.rows(true));
    }
  };
})();
