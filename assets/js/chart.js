/* A streaming chart on one persistent Plotly div.

   const chart = new fettle.Chart(node, {
     id: 'loss',                    // zoom is kept per tab under this name
     aria: 'Training loss ...',
     traces: () => [{key: 'raw', mode: 'lines', line: {...}}, ...],   // called again when the theme changes
     layout: () => ({...}),         // merged over fettle.layout()
     clock: true,                   // x is seconds, shown as m:ss (default); false: plain numbers
     every: 0,                      // ms between two drawings at least
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
  const BASE = Date.UTC(2000, 0, 1); // clock axes are date axes: native m:ss ticks at every zoom
  const toDate = s => BASE + s * 1000;
  const fromDate = v => (typeof v === 'number' ? v : Date.parse(String(v).replace(' ', 'T') + 'Z')) / 1000 - BASE / 1000;
  const CAP = 2000;

  F.Chart = class {
    constructor(node, o) {
      Object.assign(this, {
        node,
        o,
        clock: o.clock !== false,
        full: new Map(),
        pending: new Map(),
        dirty: new Set(),
        drawn: new Map(),
        ranges: {},
        own: 0,
        drawnAt: 0,
        live: false,
      });
      node.classList.add('ft-plot');
      node.setAttribute('role', 'img');
      if (o.aria) node.setAttribute('aria-label', o.aria);
      this.host = F.el('div', { class: 'ft-plot-host' });
      node.append(this.host);
      this.zoom = F.keep(this.key(), null);
      this.start();
    }
    key() {
      return `zoom.${this.o.id}${this.clock ? '' : '.' + (this.axis || 'x')}`;
    }
    async start() {
      const Plotly = (this.P = await F.plotly());
      if (!this.node.isConnected || !this.node.clientWidth)
        await new Promise(ok => {
          const w = new ResizeObserver(() => {
            if (this.node.clientWidth) {
              w.disconnect();
              ok();
            }
          });
          w.observe(this.node);
        });
      this.size = [this.node.clientWidth, this.node.clientHeight];
      await Plotly.newPlot(this.host, this.traces(), this.layout(), F.CONFIG);
      this.layer = F.svg('svg', { class: 'ft-over', 'aria-hidden': 'true' });
      this.node.append(this.layer);
      this.host.on('plotly_afterplot', () => this.paint());
      this.host.on('plotly_relayout', e => this.moved(e));
      this.host.on('plotly_relayouting', () => this.paint());
      this.host.on('plotly_doubleclick', () => this.reset());
      new ResizeObserver(() => {
        const w = this.node.clientWidth,
          h = this.node.clientHeight;
        if (!w || !h || (Math.abs(w - this.size[0]) < 2 && Math.abs(h - this.size[1]) < 2)) return;
        this.size = [w, h];
        this.mine(() => Plotly.relayout(this.host, { width: w, height: h }));
      }).observe(this.node);
      F.onTheme(() => this.rebuild());
      this.live = true;
      this.flush();
      this.paint();
    }
    async mine(f) {
      this.own++;
      try {
        await f();
      } finally {
        this.own--;
      }
    }
    index(key) {
      return this.keys.indexOf(key);
    }
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
      const from = Math.max(0, F.bisect(d.x, a) - 1),
        to = Math.min(d.x.length, F.bisect(d.x, b) + 1);
      return F.decimate(d.x, d.y, from, to, Math.min(CAP, Math.max(600, this.size[0] * 2)));
    }
    out(xs) {
      return this.clock ? xs.map(toDate) : xs;
    }
    traces() {
      const list = this.o.traces();
      this.keys = list.map(t => t.key);
      return list.map(({ key, ...t }) => {
        const p = this.part(key),
          d = this.full.get(key);
        this.drawn.set(key, p.x.length);
        const trace = { type: 'scatter', ...t, x: this.out(p.x), y: p.y };
        if (t.mode === 'lines' && p.x.length === 1)
          Object.assign(trace, { mode: 'markers', marker: { size: 4, color: t.line.color } });
        for (const [k, v] of Object.entries(d?.more || {})) {
          const path = k.split('.');
          let at = trace;
          for (const s of path.slice(0, -1)) at = at[s] = { ...(at[s] || {}) };
          at[path.at(-1)] = v;
        }
        return trace;
      });
    }
    layout() {
      const own = this.o.layout ? this.o.layout() : {};
      this.wanted();
      const coarse = matchMedia('(pointer: coarse)').matches;
      const axis = this.clock
        ? {
            type: 'date',
            tickformat: this.format(),
            hoverformat: this.format(true),
            nticks: Math.max(3, Math.floor(this.size[0] / 90)),
          }
        : { type: 'linear', tickformat: '~s', hoverformat: ',.4~s', nticks: Math.max(3, Math.floor(this.size[0] / 90)) };
      const l = F.merge(
        F.layout({ width: this.size[0], height: this.size[1], xaxis: axis, dragmode: coarse ? false : 'zoom' }),
        own,
      );
      for (const [name, r] of Object.entries({ ...this.ranges, ...(this.zoom || {}) })) {
        const k = `${name[0]}axis${name.slice(1)}`;
        if (r) {
          l[k] = { ...(l[k] || {}), range: name === 'x' ? this.out(r) : r, autorange: false };
        }
      }
      for (const k of Object.keys(l)) if (/^[xy]axis/.test(k) && coarse) l[k].fixedrange = true;
      return l;
    }
    format(hover) {
      const far = (this.ranges.x?.[1] || 0) >= 3600;
      return (far ? '%-H:%M:%S' : '%-M:%S') + (hover && !far ? '.%1f' : '');
    }
    wanted() {
      const w = this.o.auto ? this.o.auto(this) : {};
      const changes = {};
      for (const [k, r] of Object.entries(w || {})) {
        if (!r || !r.every(Number.isFinite)) continue;
        const old = this.ranges[k];
        /* axes stay still until the data leave them or fill less than two thirds */
        const span = old && old[1] - old[0];
        const slack = span * 0.001;
        if (old && r[0] >= old[0] - slack && r[1] <= old[1] + slack && r[1] - r[0] > span * 0.62) continue;
        if (k === 'x' && old && r[1] > old[1] && old[0] === r[0] && this.live) r[1] = Math.max(r[1], old[1] * 1.15);
        this.ranges[k] = r;
        changes[k] = r;
      }
      return changes;
    }
    put(key, x, y, more) {
      this.full.set(key, { x, y, more, whole: !!more });
      this.pending.delete(key);
      this.dirty.add(key);
    }
    push(key, x, y) {
      if (!x.length) return;
      const d = this.full.get(key);
      if (!d) return this.put(key, x.slice(), y.slice());
      for (let i = 0; i < x.length; i++) {
        d.x.push(x[i]);
        d.y.push(y[i]);
      }
      if (this.dirty.has(key)) return;
      const p = this.pending.get(key) || { x: [], y: [] };
      for (let i = 0; i < x.length; i++) {
        p.x.push(x[i]);
        p.y.push(y[i]);
      }
      this.pending.set(key, p);
    }
    clear() {
      this.full.clear();
      this.pending.clear();
      this.ranges = {};
      for (const k of this.keys || []) this.dirty.add(k);
    }
    /* once per frame; a chart with o.every (ms) waits that long between two drawings, so that the first one comes first */
    flush() {
      if (!this.live || this.framed) return;
      const wait = this.o.every ? this.drawnAt + this.o.every - performance.now() : 0;
      if (wait > 0) {
        this.timer ||= setTimeout(() => {
          this.timer = 0;
          this.frame();
        }, wait);
      } else if (!this.timer) this.frame();
    }
    frame() {
      if (this.framed) return;
      /* no frames in a hidden tab: what was pushed waits and is drawn when the tab is seen again */
      this.framed = requestAnimationFrame(() => {
        this.framed = 0;
        this.drawnAt = performance.now();
        this.apply();
      });
    }
    apply() {
      const P = this.P;
      for (const [key, p] of this.pending) {
        if (this.index(key) < 0) {
          this.pending.delete(key);
          continue;
        }
        const n = (this.drawn.get(key) || 0) + p.x.length;
        if (n > CAP * 1.5 || (this.zoom?.x && n > CAP) || (this.drawn.get(key) || 0) === 1) {
          this.dirty.add(key);
          this.pending.delete(key);
        }
      }
      const changes = this.zoom ? (this.wanted(), {}) : this.wanted();
      const axes = {};
      for (const [k, r] of Object.entries(changes)) {
        const a = `${k[0]}axis${k.slice(1)}`;
        axes[`${a}.range`] = k === 'x' ? this.out(r) : r;
        axes[`${a}.autorange`] = false;
        if (k === 'x' && this.clock) {
          axes['xaxis.tickformat'] = this.format();
          axes['xaxis.hoverformat'] = this.format(true);
        }
      }
      const dirty = [...this.dirty].filter(k => this.index(k) >= 0);
      this.dirty.clear();
      if (dirty.length) {
        /* react, not restyle: restyling x makes Plotly guess the axis type anew, and telling it the type resets the zoom */
        this.pending.clear();
        this.mine(() => P.react(this.host, this.traces(), this.layout(), F.CONFIG));
      } else if (Object.keys(axes).length) this.mine(() => P.relayout(this.host, axes));
      if (this.pending.size) {
        const keys = [...this.pending.keys()],
          x = [],
          y = [];
        for (const k of keys) {
          const p = this.pending.get(k);
          x.push(this.out(p.x));
          y.push(p.y);
          this.drawn.set(k, (this.drawn.get(k) || 0) + p.x.length);
        }
        this.pending.clear();
        this.mine(() =>
          P.extendTraces(
            this.host,
            { x, y },
            keys.map(k => this.index(k)),
          ),
        );
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
        if (`${k}.range[0]` in e) {
          const r = [e[`${k}.range[0]`], e[`${k}.range[1]`]];
          z[name] = name === 'x' && this.clock ? r.map(fromDate) : r.map(Number);
          seen = true;
        }
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
      if (clock !== this.clock || axis !== this.axis) {
        this.clock = clock;
        this.axis = axis;
        this.ranges = {};
        this.zoom = F.keep(this.key(), null);
      }
      if (!this.live) return;
      this.dirty.clear();
      this.pending.clear();
      return this.mine(() => this.P.react(this.host, this.traces(), this.layout(), F.CONFIG));
    }
    paint() {
      if (!this.layer || !this.o.overlay) return;
      const L = this.host._fullLayout;
      if (!L?.xaxis?._length) return;
      const ax = L.xaxis,
        box = { l: ax._offset, t: L._size.t, w: ax._length, h: L._size.h, r: ax._offset + ax._length, b: L._size.t + L._size.h };
      const X = v => box.l + ax.d2p(this.clock ? toDate(v) : v);
      const Y = (v, n = '') => {
        const a = L['yaxis' + n];
        return a._offset + a.d2p(v);
      };
      this.layer.setAttribute('width', this.size[0]);
      this.layer.setAttribute('height', this.size[1]);
      const g = F.svg('g');
      const [x0, x1] = this.zoom?.x || this.ranges.x || [0, 1];
      this.o.overlay(new F.Draw(g, X, Y, box, this, x0, x1));
      this.layer.replaceChildren(g);
    }
  };
})();
