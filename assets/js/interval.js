/* Runs as marks: the marker of a run, and its main figure with its interval on a scale that the whole table shares. */
(() => {
  'use strict';
  const F = window.fettle;
  const PATHS = {
    circle: 'M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z',
    square: 'M-3.6-3.6H3.6V3.6H-3.6Z',
    diamond: 'M0-5 5 0 0 5-5 0Z',
    'triangle-up': 'M0-5 4.6 3.6H-4.6Z',
    'triangle-down': 'M0 5 4.6-3.6H-4.6Z',
    right: 'M-3.2-4 4 0-3.2 4Z',
    left: 'M3.2-4-4 0 3.2 4Z',
  };
  const mark = (symbol, x, y, css, scale = 1, open = false) =>
    F.svg('path', {
      d: PATHS[symbol],
      transform: `translate(${x.toFixed(1)} ${y}) scale(${scale})`,
      style: `fill:${open ? 'var(--ft-panel)' : css};stroke:${css};stroke-width:1.5`,
    });
  /* the marker of a run, for headings and lists */
  F.runMark = (slot, size = 10) =>
    F.svg(
      'svg',
      { class: 'ft-mk', width: size, height: size, viewBox: '-5 -5 10 10', 'aria-hidden': 'true' },
      mark(F.run(slot).symbol, 0, 0, F.run(slot).css, 0.85),
    );
  F.PATHS = PATHS;

  const LOWER = metric => !/accuracy/.test(metric || '');
  F.lowerIsBetter = LOWER;

  /* a common scale for the interval column, from the bulk of the values: outliers become arrows with their figure */
  const scale = rows => {
    const own = rows.filter(r => F.finite(r.value));
    if (!own.length) return null;
    const counts = {};
    for (const r of own) counts[r.metric] = (counts[r.metric] || 0) + 1;
    const metric = Object.keys(counts).sort((a, b) => counts[b] - counts[a])[0],
      of = own.filter(r => r.metric === metric);
    const low = r => (F.finite(r.low) ? r.low : r.value),
      high = r => (F.finite(r.high) ? r.high : r.value);
    const v = of.map(r => r.value).sort((a, b) => a - b),
      q = p => v[Math.round(p * (v.length - 1))],
      spread = Math.max(q(0.75) - q(0.25), ...of.slice(0, 1).map(r => high(r) - low(r)), Math.abs(v[0]) * 0.004);
    const bulk = of.filter(r => r.value >= q(0.25) - 2.2 * spread && r.value <= q(0.75) + 2.2 * spread);
    let a = Math.min(...bulk.map(low)),
      b = Math.max(...bulk.map(high));
    const pad = (b - a || Math.abs(a) * 0.05 || 1) * 0.06;
    a -= pad;
    b += pad;
    const step =
        [1, 2, 5, 10].map(m => m * 10 ** Math.floor(Math.log10((b - a) / 4))).find(s => (b - a) / s <= 5.5) || (b - a) / 4,
      ticks = [];
    for (let t = Math.ceil(a / step) * step; t <= b; t += step) ticks.push(+t.toFixed(10));
    return { metric, a, b, ticks, places: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  };
  const WIDTH = 200;
  const H = 24;
  const plot = (r, s, base) => {
    const svg = F.svg('svg', {
      width: WIDTH,
      height: H,
      viewBox: `0 0 ${WIDTH} ${H}`,
      role: 'img',
      'aria-label': F.finite(r.value) ? F.interval(r.value, r.low, r.high, r.metric) : 'no figure yet',
    });
    if (!s) return svg;
    const X = v => 6 + ((v - s.a) / (s.b - s.a)) * (WIDTH - 12);
    for (const t of s.ticks) svg.append(F.svg('line', { class: 'grid', x1: X(t), x2: X(t), y1: 0, y2: H }));
    if (F.finite(base) && base > s.a && base < s.b)
      svg.append(F.svg('line', { class: 'ref', x1: X(base), x2: X(base), y1: 0, y2: H }));
    if (!F.finite(r.value) || r.metric !== s.metric) return svg;
    const k = r.mark || F.run(r.slot);
    if (r.value > s.b || r.value < s.a) {
      const right = r.value > s.b;
      svg.append(
        F.svg('text', { x: right ? WIDTH - 16 : 16, y: H / 2 + 4, 'text-anchor': right ? 'end' : 'start' }, figure(r.value)),
        mark(right ? 'right' : 'left', right ? WIDTH - 8 : 8, H / 2, k.css, 0.9),
      );
      return svg;
    }
    const clip = v => Math.max(s.a, Math.min(s.b, v));
    if (F.finite(r.low) && F.finite(r.high))
      svg.append(
        F.svg('line', {
          x1: X(clip(r.low)),
          x2: X(clip(r.high)),
          y1: H / 2,
          y2: H / 2,
          style: `stroke:${k.css};stroke-width:2;opacity:.45`,
        }),
      );
    svg.append(mark(k.symbol, X(r.value), H / 2, k.css, 0.78));
    return svg;
  };
  const figure = v => (Math.abs(v) >= 20 ? v.toFixed(1) : v.toFixed(3));

  F.intervals = { scale, plot, figure, WIDTH };
})();
