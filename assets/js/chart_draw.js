/* What charts need besides Plotly: thinning that keeps spikes, smoothing, and marks drawn over a plot. */
(() => {
  'use strict';
  const F = window.fettle;

  /* min and max of each bucket of neighbouring points, so that no spike is lost; nulls (gaps) survive */
  F.decimate = (x, y, from, to, most) => {
    const n = to - from;
    if (n <= most) return { x: x.slice(from, to), y: y.slice(from, to) };
    const ox = [],
      oy = [],
      buckets = Math.max(1, most >> 1),
      per = n / buckets;
    for (let b = 0; b < buckets; b++) {
      const s = from + Math.floor(b * per),
        e = Math.min(to, from + Math.floor((b + 1) * per));
      let lo = -1,
        hi = -1,
        gap = -1;
      for (let i = s; i < e; i++) {
        if (y[i] === null) {
          gap = i;
          continue;
        }
        if (lo < 0 || y[i] < y[lo]) lo = i;
        if (hi < 0 || y[i] > y[hi]) hi = i;
      }
      for (const i of [...new Set([lo, hi, gap].filter(i => i >= 0))].sort((a, c) => a - c)) {
        ox.push(x[i]);
        oy.push(y[i]);
      }
    }
    return { x: ox, y: oy };
  };
  F.bisect = (x, v) => {
    let a = 0,
      b = x.length;
    while (a < b) {
      const k = (a + b) >> 1;
      x[k] < v ? (a = k + 1) : (b = k);
    }
    return a;
  };
  F.quantile = (values, q) => {
    const v = values.filter(F.finite).sort((a, b) => a - b);
    return v.length ? v[Math.min(v.length - 1, Math.max(0, Math.round(q * (v.length - 1))))] : null;
  };
  F.median = v => F.quantile(v, 0.5);
  /* debiased exponential mean that can go on where it stopped */
  F.ema = (k, state = { s: 0, w: 0 }) => ({
    state,
    next(y) {
      if (!F.finite(y)) return null;
      state.s = state.s * k + y * (1 - k);
      state.w = state.w * k + 1 - k;
      return state.s / state.w;
    },
  });
  F.nice = (lo, hi, pad = 0.06) => {
    if (!(hi > lo)) {
      const d = Math.abs(lo) * 0.05 || 1;
      lo -= d;
      hi += d;
    }
    const d = (hi - lo) * pad;
    return [lo - d, hi + d];
  };

  let uid = 0;
  /* marks over a plot: limits with hatching, the now line, labels that keep apart */
  F.Draw = class {
    constructor(g, X, Y, box, chart, x0, x1) {
      Object.assign(this, { g, X, Y, box, chart, x0, x1, narrow: chart.size[0] < 480 });
    }
    add(tag, a, text) {
      const n = F.svg(tag, a);
      if (text !== undefined) n.textContent = text;
      this.g.append(n);
      return n;
    }
    inX(x) {
      return x >= this.box.l - 0.5 && x <= this.box.r + 0.5;
    }
    inY(y) {
      return y >= this.box.t - 0.5 && y <= this.box.b + 0.5;
    }
    text(x, y, s, cls = '', anchor = 'start') {
      return this.add('text', { x, y, class: 'halo ' + cls, 'text-anchor': anchor }, s);
    }
    hatch(x, y, w, h) {
      if (w <= 0 || h <= 0) return;
      const id = 'fth' + ++uid;
      const p = F.svg(
        'pattern',
        { id, width: 5, height: 5, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(-45)' },
        F.svg('line', { x1: 0, y1: 0, x2: 5, y2: 0, class: 'hatch' }),
      );
      this.g.append(p);
      this.add('rect', { x, y, width: w, height: h, fill: `url(#${id})` });
    }
    limitX(v, label) {
      const x = this.X(v),
        b = this.box;
      if (x > b.r + 0.5) return;
      const from = Math.max(x, b.l);
      this.hatch(from, b.t, b.r - from, b.h);
      if (x < b.l) return;
      this.add('line', { x1: x, x2: x, y1: b.t - 3, y2: b.b, class: 'limit' });
      if (label) this.text(x - 5, b.b - 8, label, 'ink b', 'end');
    }
    limitY(v, label) {
      const y = this.Y(v),
        b = this.box;
      if (y > b.b + 0.5) return;
      const to = Math.min(b.b, Math.max(y, b.t));
      this.hatch(b.l, b.t, b.w, to - b.t);
      if (y < b.t) return;
      this.add('line', { x1: b.l, x2: b.r, y1: y, y2: y, class: 'limit' });
      if (label) this.text(b.l + 5, y - 5, label, 'ink b');
    }
    ref(v, label, at = 'l', n = '') {
      const y = this.Y(v, n),
        b = this.box;
      if (!this.inY(y)) return;
      this.add('line', { x1: b.l, x2: b.r, y1: y, y2: y, class: 'ref' });
      if (label) this.text(at === 'l' ? b.l + 6 : b.r - 2, y - 5, label, '', at === 'l' ? 'start' : 'end');
    }
    dashed(v, n = '') {
      const y = this.Y(v, n);
      if (this.inY(y)) this.add('line', { x1: this.box.l, x2: this.box.r, y1: y, y2: y, class: 'dashed' });
    }
    now(v) {
      const x = this.X(v),
        b = this.box;
      if (!this.inX(x)) return;
      this.add('line', { x1: x, x2: x, y1: b.t - 2, y2: b.b, class: 'now' });
      this.add('path', { d: `M${x - 4} ${b.t - 6}h8l-4 5z`, class: 'notch' });
    }
    mark(v) {
      const x = this.X(v);
      if (this.inX(x)) this.add('path', { d: `M${x} ${this.box.b - 1}l-3.5 -6h7z`, class: 'tri' });
    }
    forecast(vx, vy, label, n = '') {
      const x = Math.min(this.X(vx), this.box.r - 4),
        y = this.Y(vy, n);
      if (x < this.box.l || !this.inY(y)) return;
      this.add('path', { d: `M${x} ${y - 4}l4 4l-4 4l-4 -4z`, class: 'fc' });
      (this.more ||= []).push({ p: y, fixed: true, at: x - 10, to: x + 10, t: '', quiet: true });
      if (label) this.more.push({ p: y + 12, at: x - 8, t: label, quiet: true });
    }
    /* labels at the ends of lines, pushed 13 px apart; [{x, y (values), n (axis), k (bold), t, c (colour)}] */
    ends(list) {
      const b = this.box;
      const E = list
        .filter(e => F.finite(e.y))
        .map(e => ({ ...e, p: this.Y(e.y, e.n || ''), at: Math.min(this.X(e.x), b.r) + 6 }))
        .filter(e => e.p > b.t - 20 && e.p < b.b + 20 && e.at > b.l);
      const wide = e => `${e.k ? e.k + ' ' : ''}${e.t}`.length * 5.9;
      const left = E.some(e => e.at + wide(e) > this.chart.size[0]);
      if (left) for (const e of E) e.p -= 13;
      E.push(...(this.more || []).filter(m => !m.fixed || E.some(e => !left && e.at < m.to && e.at + wide(e) > m.at)));
      E.sort((a, c) => a.p - c.p);
      for (const e of E) e.q = e.fixed ? e.p : Math.min(b.b - 3, Math.max(b.t + 6, e.p));
      for (let k = 0; k < 40; k++) {
        let moved = false;
        for (let i = 1; i < E.length; i++) {
          const d = E[i].q - E[i - 1].q;
          if (d >= 12.9) continue;
          const up = E[i].fixed ? 1 : E[i - 1].fixed ? 0 : 0.5;
          E[i - 1].q -= (13 - d) * up;
          E[i].q += (13 - d) * (1 - up);
          moved = true;
        }
        if (!moved) break;
      }
      for (const e of E) {
        if (e.quiet) {
          if (e.t) this.text(e.at, e.q + 3.5, e.t, 'ink2', 'end');
          continue;
        }
        const t = this.add('text', {
          x: left ? Math.min(e.at - 12, b.r - 2) : e.at,
          y: e.q + 3.5,
          class: 'halo ink',
          'text-anchor': left ? 'end' : 'start',
        });
        if (e.k) t.append(F.svg('tspan', { class: 'b', style: e.c ? `fill:${e.c}` : '' }, e.k + ' '));
        t.append(F.svg('tspan', { class: e.k ? '' : 'b' }, e.t));
      }
    }
  };
})();
