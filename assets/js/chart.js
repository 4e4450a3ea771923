/* A streaming chart on one persistent Plotly div.

   const chart = new fettle.Chart(node, {
     id: 'loss',                    // zoom is kept per tab under this name
     aria: 'Training loss ...',
     traces: () => [{key: 'raw', mode: 'lines', line: {...}}, ...],   // called again when the theme changes
     layout: () => ({...}),         // merged over fettle.layout()
     clock: true,                   // x is seconds, shown as m:ss (default); false: plain numbers
     auto: chart => ({x: [a, b], y: [c, d], y2: ...}),   // ranges wanted while the person has not zoomed
     overlay: draw => {...},        // labels, limits, now: drawn over the plot after every change, cheap
   });
   chart.push('raw', xs, ys)        // append: Plotly.extendTraces
   chart.put('raw', xs, ys, more)   // replace; more: other arrays of the trace ({'error_y.array': [...]})
   chart.flush()                    // apply what was pushed and put, once per frame
   Full data stays here; what is drawn is thinned to the pixels in view with the spikes kept, and thinned anew on zoom. */
(() => {
  'use strict';
  const F = window.fettle;
  const BASE = Date.UTC(2000, 0, 1);              // clock axes are date axes: native m:ss ticks at every zoom
  const toDate = s => BASE + s * 1000;
  const fromDate = v => (typeof v === 'number' ? v : Date.parse(String(v).replace(' ', 'T') + 'Z')) / 1000 - BASE / 1000;
  const CAP = 3000;

  /* min and max of each bucket of neighbouring points, so that no spike is lost; nulls (gaps) survive */
  F.decimate = (x, y, from, to, most) => {
    const n = to - from;
    if (n <= most) return { x: x.slice(from, to), y: y.slice(from, to) };
    const ox = [], oy = [], buckets = Math.max(1, most >> 1), per = n / buckets;
    for (let b = 0; b < buckets; b++) {
      const s = from + Math.floor(b * per), e = Math.min(to, from + Math.floor((b + 1) * per));
      let lo = -1, hi = -1, gap = -1;
      for (let i = s; i < e; i++) {
        if (y[i] === null) { gap = i; continue; }
        if (lo < 0 || y[i] < y[lo]) lo = i;
        if (hi < 0 || y[i] > y[hi]) hi = i;
      }
      for (const i of [...new Set([lo, hi, gap].filter(i => i >= 0))].sort((a, c) => a - c)) { ox.push(x[i]); oy.push(y[i]); }
    }
    return { x: ox, y: oy };
  };
  F.bisect = (x, v) => { let a = 0, b = x.length; while (a < b) { const k = (a + b) >> 1; x[k] < v ? a = k + 1 : b = k; } return a; };
  F.quantile = (values, q) => { const v = values.filter(F.finite).sort((a, b) => a - b); return v.length ? v[Math.min(v.length - 1, Math.max(0, Math.round(q * (v.length - 1))))] : null; };
  F.median = v => F.quantile(v, .5);
  /* debiased exponential mean that can go on where it stopped */
  F.ema = (k, state = { s: 0, w: 0 }) => ({ state, next(y) { if (!F.finite(y)) return null; state.s = state.s * k + y * (1 - k); state.w = state.w * k + 1 - k; return state.s / state.w; } });
  F.nice = (lo, hi, pad = .06) => { if (!(hi > lo)) { const d = Math.abs(lo) * .05 || 1; lo -= d; hi += d; } const d = (hi - lo) * pad; return [lo - d, hi + d]; };

  F.Chart = class {
    constructor(node, o) {
      Object.assign(this, { node, o, clock: o.clock !== false, full: new Map(), pending: new Map(), dirty: new Set(), drawn: new Map(), ranges: {}, own: 0, live: false });
      node.classList.add('ft-plot');
      node.setAttribute('role', 'img');
      if (o.aria) node.setAttribute('aria-label', o.aria);
      this.host = F.el('div', { class: 'ft-plot-host' });
      node.append(this.host);
      this.zoom = F.keep(this.key(), null);
      this.start();
    }
    key() { return `zoom.${this.o.id}${this.clock ? '' : '.' + (this.axis || 'x')}`; }
    async start() {
      const Plotly = this.P = await F.plotly();
      if (!this.node.isConnected || !this.node.clientWidth) await new Promise(ok => { const w = new ResizeObserver(() => { if (this.node.clientWidth) { w.disconnect(); ok(); } }); w.observe(this.node); });
      this.size = [this.node.clientWidth, this.node.clientHeight];
      await Plotly.newPlot(this.host, this.traces(), this.layout(), F.CONFIG);
      this.layer = F.svg('svg', { class: 'ft-over', 'aria-hidden': 'true' });
      this.node.append(this.layer);
      this.host.on('plotly_afterplot', () => this.paint());
      this.host.on('plotly_relayout', e => this.moved(e));
      this.host.on('plotly_relayouting', () => this.paint());
      this.host.on('plotly_doubleclick', () => this.reset());
      new ResizeObserver(() => {
        const w = this.node.clientWidth, h = this.node.clientHeight;
        if (!w || !h || Math.abs(w - this.size[0]) < 2 && Math.abs(h - this.size[1]) < 2) return;
        this.size = [w, h];
        this.mine(() => Plotly.relayout(this.host, { width: w, height: h }));
      }).observe(this.node);
      F.onTheme(() => this.rebuild());
      this.live = true;
      this.flush();
      this.paint();
    }
    async mine(f) { this.own++; try { await f(); } finally { this.own--; } }
    index(key) { return this.keys.indexOf(key); }
    view() {
      const r = this.zoom?.x || this.ranges.x;
      return r ? r.slice() : [-Infinity, Infinity];
    }
    /* the part of a series to draw: the view and a margin on each side, thinned */
    part(key) {
      const d = this.full.get(key);
      if (!d) return { x: [], y: [] };
      if (d.whole || d.x.length <= CAP) return { x: d.x.slice(), y: d.y.slice() };
      const [a, b] = this.zoom?.x || [-Infinity, Infinity];
      const from = Math.max(0, F.bisect(d.x, a) - 1), to = Math.min(d.x.length, F.bisect(d.x, b) + 1);
      return F.decimate(d.x, d.y, from, to, Math.min(CAP, Math.max(600, this.size[0] * 2)));
    }
    out(xs) { return this.clock ? xs.map(toDate) : xs; }
    traces() {
      const list = this.o.traces();
      this.keys = list.map(t => t.key);
      return list.map(({ key, ...t }) => {
        const p = this.part(key), d = this.full.get(key);
        this.drawn.set(key, p.x.length);
        const trace = { type: 'scatter', ...t, x: this.out(p.x), y: p.y };
        for (const [k, v] of Object.entries(d?.more || {})) { const path = k.split('.'); let at = trace; for (const s of path.slice(0, -1)) at = at[s] = { ...(at[s] || {}) }; at[path.at(-1)] = v; }
        return trace;
      });
    }
    layout() {
      const own = this.o.layout ? this.o.layout() : {};
      this.wanted();
      const coarse = matchMedia('(pointer: coarse)').matches;
      const axis = this.clock
        ? { type: 'date', tickformat: this.format(), hoverformat: this.format(true), nticks: Math.max(3, Math.floor(this.size[0] / 90)) }
        : { type: 'linear', tickformat: '~s', hoverformat: ',.4~s', nticks: Math.max(3, Math.floor(this.size[0] / 90)) };
      const l = F.merge(F.layout({ width: this.size[0], height: this.size[1], xaxis: axis, dragmode: coarse ? false : 'zoom' }), own);
      for (const [name, r] of Object.entries({ ...this.ranges, ...(this.zoom || {}) })) {
        const k = `${name[0]}axis${name.slice(1)}`;
        if (r) { l[k] = { ...(l[k] || {}), range: name === 'x' ? this.out(r) : r, autorange: false }; }
      }
      for (const k of Object.keys(l)) if (/^[xy]axis/.test(k) && coarse) l[k].fixedrange = true;
      return l;
    }
    format(hover) { const far = (this.ranges.x?.[1] || 0) >= 3600; return (far ? '%-H:%M:%S' : '%-M:%S') + (hover && !far ? '.%1f' : ''); }
    wanted() {
      const w = this.o.auto ? this.o.auto(this) : {};
      const changes = {};
      for (const [k, r] of Object.entries(w || {})) {
        if (!r || !r.every(Number.isFinite)) continue;
        const old = this.ranges[k];
        /* axes stay still until the data leave them or fill less than two thirds */
        const span = old && old[1] - old[0];
        const slack = span * .001;
        if (old && r[0] >= old[0] - slack && r[1] <= old[1] + slack && r[1] - r[0] > span * .62) continue;
        if (k === 'x' && old && r[1] > old[1] && old[0] === r[0] && this.live) r[1] = Math.max(r[1], old[1] * 1.15);
        this.ranges[k] = r; changes[k] = r;
      }
      return changes;
    }
    put(key, x, y, more) { this.full.set(key, { x, y, more, whole: !!more }); this.pending.delete(key); this.dirty.add(key); }
    push(key, x, y) {
      if (!x.length) return;
      const d = this.full.get(key);
      if (!d) return this.put(key, x.slice(), y.slice());
      for (let i = 0; i < x.length; i++) { d.x.push(x[i]); d.y.push(y[i]); }
      if (this.dirty.has(key)) return;
      const p = this.pending.get(key) || { x: [], y: [] };
      for (let i = 0; i < x.length; i++) { p.x.push(x[i]); p.y.push(y[i]); }
      this.pending.set(key, p);
    }
    clear() { this.full.clear(); this.pending.clear(); this.ranges = {}; for (const k of this.keys || []) this.dirty.add(k); }
    flush() {
      if (!this.live || this.framed) return;
      this.framed = requestAnimationFrame(() => { this.framed = 0; this.apply(); });
      /* no frames in a hidden tab: data would pile up there; they are applied when it is seen again */
    }
    apply() {
      const P = this.P;
      for (const [key, p] of this.pending) {
        if (this.index(key) < 0) { this.pending.delete(key); continue; }
        const n = (this.drawn.get(key) || 0) + p.x.length;
        if (n > CAP * 1.5 || this.zoom?.x && n > CAP) { this.dirty.add(key); this.pending.delete(key); }
      }
      const changes = this.zoom ? (this.wanted(), {}) : this.wanted();
      const axes = {};
      for (const [k, r] of Object.entries(changes)) { const a = `${k[0]}axis${k.slice(1)}`; axes[`${a}.range`] = k === 'x' ? this.out(r) : r; axes[`${a}.autorange`] = false; if (k === 'x' && this.clock) { axes['xaxis.tickformat'] = this.format(); axes['xaxis.hoverformat'] = this.format(true); } }
      const dirty = [...this.dirty].filter(k => this.index(k) >= 0);
      this.dirty.clear();
      if (dirty.length) {
        /* react, not restyle: restyling x makes Plotly guess the axis type anew, and telling it the type resets the zoom */
        this.pending.clear();
        this.mine(() => P.react(this.host, this.traces(), this.layout(), F.CONFIG));
      } else if (Object.keys(axes).length) this.mine(() => P.relayout(this.host, axes));
      if (this.pending.size) {
        const keys = [...this.pending.keys()], x = [], y = [];
        for (const k of keys) { const p = this.pending.get(k); x.push(this.out(p.x)); y.push(p.y); this.drawn.set(k, (this.drawn.get(k) || 0) + p.x.length); }
        this.pending.clear();
        this.mine(() => P.extendTraces(this.host, { x, y }, keys.map(k => this.index(k))));
      } else if (!dirty.length && !Object.keys(axes).length) this.paint();
      this.node.dispatchEvent(new CustomEvent('fettle-drawn', { bubbles: true }));
    }
    moved(e) {
      if (this.own) return;
      const z = { ...(this.zoom || {}) };
      let seen = false;
      for (const k of Object.keys(this.host._fullLayout).filter(k => /^[xy]axis\d*$/.test(k))) {
        const name = k[0] + k.slice(5);
        if (e[`${k}.autorange`]) return this.reset();
        if (`${k}.range[0]` in e) { const r = [e[`${k}.range[0]`], e[`${k}.range[1]`]]; z[name] = name === 'x' && this.clock ? r.map(fromDate) : r.map(Number); seen = true; }
      }
      if (!seen) return;
      this.zoom = z;
      F.keep.set(this.key(), z);
      for (const [k, d] of this.full) if (d.x.length > CAP) this.dirty.add(k);
      this.flush();
    }
    reset() {
      this.zoom = null;
      F.keep.set(this.key(), undefined);
      this.ranges = {};
      this.rebuild();
    }
    /* another x axis, another theme: the same div, everything set anew */
    rebuild({ clock = this.clock, axis = this.axis } = {}) {
      if (clock !== this.clock || axis !== this.axis) { this.clock = clock; this.axis = axis; this.ranges = {}; this.zoom = F.keep(this.key(), null); }
      if (!this.live) return;
      this.dirty.clear(); this.pending.clear();
      return this.mine(() => this.P.react(this.host, this.traces(), this.layout(), F.CONFIG));
    }
    paint() {
      if (!this.layer || !this.o.overlay) return;
      const L = this.host._fullLayout;
      if (!L?.xaxis?._length) return;
      const ax = L.xaxis, box = { l: ax._offset, t: L._size.t, w: ax._length, h: L._size.h, r: ax._offset + ax._length, b: L._size.t + L._size.h };
      const X = v => box.l + ax.d2p(this.clock ? toDate(v) : v);
      const Y = (v, n = '') => { const a = L['yaxis' + n]; return a._offset + a.d2p(v); };
      this.layer.setAttribute('width', this.size[0]); this.layer.setAttribute('height', this.size[1]);
      const g = F.svg('g');
      const [x0, x1] = this.zoom?.x || this.ranges.x || [0, 1];
      this.o.overlay(new Draw(g, X, Y, box, this, x0, x1));
      this.layer.replaceChildren(g);
    }
  };

  let uid = 0;
  /* marks over a plot: limits with hatching, the now line, labels that keep apart */
  class Draw {
    constructor(g, X, Y, box, chart, x0, x1) { Object.assign(this, { g, X, Y, box, chart, x0, x1, narrow: chart.size[0] < 480 }); }
    add(tag, a, text) { const n = F.svg(tag, a); if (text !== undefined) n.textContent = text; this.g.append(n); return n; }
    inX(x) { return x >= this.box.l - .5 && x <= this.box.r + .5; }
    inY(y) { return y >= this.box.t - .5 && y <= this.box.b + .5; }
    text(x, y, s, cls = '', anchor = 'start') { return this.add('text', { x, y, class: 'halo ' + cls, 'text-anchor': anchor }, s); }
    hatch(x, y, w, h) {
      if (w <= 0 || h <= 0) return;
      const id = 'fth' + (++uid);
      const p = F.svg('pattern', { id, width: 5, height: 5, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(-45)' }, F.svg('line', { x1: 0, y1: 0, x2: 5, y2: 0, class: 'hatch' }));
      this.g.append(p);
      this.add('rect', { x, y, width: w, height: h, fill: `url(#${id})` });
    }
    limitX(v, label) {
      const x = this.X(v), b = this.box;
      if (x > b.r + .5) return;
      const from = Math.max(x, b.l);
      this.hatch(from, b.t, b.r - from, b.h);
      if (x < b.l) return;
      this.add('line', { x1: x, x2: x, y1: b.t - 3, y2: b.b, class: 'limit' });
      if (label) this.text(x - 5, b.b - 8, label, 'ink b', 'end');
    }
    limitY(v, label) {
      const y = this.Y(v), b = this.box;
      if (y > b.b + .5) return;
      const to = Math.min(b.b, Math.max(y, b.t));
      this.hatch(b.l, b.t, b.w, to - b.t);
      if (y < b.t) return;
      this.add('line', { x1: b.l, x2: b.r, y1: y, y2: y, class: 'limit' });
      if (label) this.text(b.l + 5, y - 5, label, 'ink b');
    }
    ref(v, label, at = 'l', n = '') {
      const y = this.Y(v, n), b = this.box;
      if (!this.inY(y)) return;
      this.add('line', { x1: b.l, x2: b.r, y1: y, y2: y, class: 'ref' });
      if (label) this.text(at === 'l' ? b.l + 6 : b.r - 2, y - 5, label, '', at === 'l' ? 'start' : 'end');
    }
    dashed(v, n = '') { const y = this.Y(v, n); if (this.inY(y)) this.add('line', { x1: this.box.l, x2: this.box.r, y1: y, y2: y, class: 'dashed' }); }
    now(v) {
      const x = this.X(v), b = this.box;
      if (!this.inX(x)) return;
      this.add('line', { x1: x, x2: x, y1: b.t - 2, y2: b.b, class: 'now' });
      this.add('path', { d: `M${x - 4} ${b.t - 6}h8l-4 5z`, class: 'notch' });
    }
    mark(v) { const x = this.X(v); if (this.inX(x)) this.add('path', { d: `M${x} ${this.box.b - 1}l-3.5 -6h7z`, class: 'tri' }); }
    forecast(vx, vy, label, n = '') {
      const x = Math.min(this.X(vx), this.box.r - 4), y = this.Y(vy, n);
      if (x < this.box.l || !this.inY(y)) return;
      this.add('path', { d: `M${x} ${y - 4}l4 4l-4 4l-4 -4z`, class: 'fc' });
      (this.more ||= []).push({ p: y, fixed: true, at: x - 10, to: x + 10, t: '', quiet: true });
      if (label) this.more.push({ p: y + 12, at: x - 8, t: label, quiet: true });
    }
    /* labels at the ends of lines, pushed 13 px apart; [{x, y (values), n (axis), k (bold), t, c (colour)}] */
    ends(list) {
      const b = this.box;
      const E = list.filter(e => F.finite(e.y)).map(e => ({ ...e, p: this.Y(e.y, e.n || ''), at: Math.min(this.X(e.x), b.r) + 6 })).filter(e => e.p > b.t - 20 && e.p < b.b + 20 && e.at > b.l);
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
          const up = E[i].fixed ? 1 : E[i - 1].fixed ? 0 : .5;
          E[i - 1].q -= (13 - d) * up; E[i].q += (13 - d) * (1 - up); moved = true;
        }
        if (!moved) break;
      }
      for (const e of E) {
        if (e.quiet) { if (e.t) this.text(e.at, e.q + 3.5, e.t, 'ink2', 'end'); continue; }
        const t = this.add('text', { x: left ? Math.min(e.at - 12, b.r - 2) : e.at, y: e.q + 3.5, class: 'halo ink', 'text-anchor': left ? 'end' : 'start' });
        if (e.k) t.append(F.svg('tspan', { class: 'b', style: e.c ? `fill:${e.c}` : '' }, e.k + ' '));
        t.append(F.svg('tspan', { class: e.k ? '' : 'b' }, e.t));
      }
    }
  }
})();
