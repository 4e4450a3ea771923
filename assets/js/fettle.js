/* The library shared by all components: formats, nodes, tokens, run identity, Plotly basics. fettle_page.js goes on with
   server calls and small state. Loaded in the head of every page; conventions are in components/layout.py. */
(() => {
  'use strict';
  const NB = '\u00a0';
  const MISSING = 'no figure';
  const F = {};
  window.fettle = F;
  F.NB = NB;
  F.MISSING = MISSING;

  /* ---------- figures ---------- */
  const finite = v => typeof v === 'number' && Number.isFinite(v);
  F.finite = finite;
  F.fig = (v, digits = 3) => {
    if (!finite(v)) return MISSING;
    if (v === 0) return '0';
    const a = Math.abs(v);
    if (a < 1e-4 || a >= 1e7) {
      const [m, e] = v.toExponential(digits - 1).split('e');
      return `${m.includes('.') ? m.replace(/\.?0+$/, '') : m}e${+e}`;
    }
    const places = Math.max(0, digits - 1 - Math.floor(Math.log10(a)));
    return v.toLocaleString('en-US', { minimumFractionDigits: places, maximumFractionDigits: places });
  };
  F.whole = v => (finite(v) ? Math.round(v).toLocaleString('en-US') : MISSING);
  F.fixed = (v, places) =>
    finite(v) ? v.toLocaleString('en-US', { minimumFractionDigits: places, maximumFractionDigits: places }) : MISSING;
  F.unit = (v, unit, digits = 3) => (finite(v) ? F.fig(v, digits) + NB + unit : MISSING);
  const scaled = (v, steps) => {
    for (const [s, n] of steps) if (Math.abs(v) >= s * 0.9995) return [v / s, n];
    return [v, ''];
  };
  const BYTES = [
    [1e12, 'TB'],
    [1e9, 'GB'],
    [1e6, 'MB'],
    [1e3, 'kB'],
    [0, 'B'],
  ];
  const COUNTS = [
    [1e12, 'T'],
    [1e9, 'G'],
    [1e6, 'M'],
    [1e3, 'k'],
  ];
  F.sizeParts = v => {
    if (!finite(v)) return [MISSING, ''];
    const [x, u] = scaled(v, BYTES);
    return u === 'B' ? [String(Math.round(v)), u] : [F.fig(x), u];
  };
  F.size = v => (finite(v) ? F.sizeParts(v).join(NB) : MISSING);
  F.gb = v => (finite(v) ? F.fixed(v / 1e9, 2) + NB + 'GB' : MISSING);
  F.countParts = v => {
    if (!finite(v)) return [MISSING, ''];
    const [x, u] = scaled(v, COUNTS);
    return u ? [F.fig(x), u] : [Number.isInteger(v) ? String(v) : F.fig(v), ''];
  };
  F.count = v => {
    const [x, u] = F.countParts(v);
    return u ? x + NB + u : x;
  };
  F.percent = (share, digits = 3) => (finite(share) ? F.unit(100 * share, '%', digits) : MISSING);
  F.clock = s => {
    if (!finite(s)) return MISSING;
    const w = Math.max(0, Math.round(s)),
      m = Math.floor(w / 60),
      two = n => String(n).padStart(2, '0');
    return m >= 60 ? `${Math.floor(m / 60)}:${two(m % 60)}:${two(w % 60)}` : `${m}:${two(w % 60)}`;
  };
  F.clock1 = s => {
    if (!finite(s)) return MISSING;
    const t = Math.max(0, Math.round(s * 10));
    return `${Math.floor(t / 600)}:${String(Math.floor(t / 10) % 60).padStart(2, '0')}.${t % 10}`;
  };
  F.interval = (v, low, high, unit) => {
    if (!finite(v)) return MISSING;
    const half = finite(low) && finite(high) ? ` ± ${((high - low) / 2).toFixed(3)}` : '';
    return v.toFixed(3) + half + (unit ? NB + unit : '');
  };
  F.moment = t => {
    if (!finite(t)) return MISSING;
    const d = new Date(t * 1000),
      two = n => String(n).padStart(2, '0');
    const day = `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
    return d.toDateString() === new Date().toDateString()
      ? day
      : `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${day}`;
  };
  F.ago = t => {
    const s = Math.max(0, Date.now() / 1000 - t);
    return s < 90
      ? `${Math.round(s)}${NB}s ago`
      : s < 5400
        ? `${Math.round(s / 60)}${NB}min ago`
        : s < 129600
          ? `${Math.round(s / 3600)}${NB}h ago`
          : `${Math.round(s / 86400)}${NB}days ago`;
  };
  F.ordinal = n => {
    const r = n % 100,
      s = ['th', 'st', 'nd', 'rd'];
    return n + (s[(r - 20) % 10] || s[r] || s[0]);
  };

  /* ---------- nodes: what people typed goes through textContent ---------- */
  const SVG = 'http://www.w3.org/2000/svg';
  const fill = (node, attributes, children) => {
    for (const [k, v] of Object.entries(attributes || {})) {
      if (v === undefined || v === null || v === false) continue;
      if (k.startsWith('on') && typeof v === 'function') node.addEventListener(k.slice(2), v);
      else if (k === 'style' && typeof v === 'object') for (const [p, x] of Object.entries(v)) node.style.setProperty(p, x);
      else node.setAttribute(k, v === true ? '' : v);
    }
    for (const c of children.flat(Infinity)) if (c !== null && c !== undefined && c !== false) node.append(c);
    return node;
  };
  F.el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  F.svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  F.icon = (name, cls = '') =>
    F.svg(
      'svg',
      { class: `ic ${cls}`, 'aria-hidden': 'true' },
      F.svg('use', { href: '#' + (/^[fsi]-/.test(name) ? name : 'i-' + name) }),
    );
  const FAMILY = {
    adaptation: 'f-adapt',
    pruning: 'f-prune',
    quantization: 'f-quant',
    kv_cache: 'f-kv',
    full: 'f-full',
    distillation: 'f-distil',
    switch: 'f-switch',
  };
  F.family = (family, cls = '') => F.icon(FAMILY[family] || 'f-full', cls);
  F.text = (node, s) => {
    if (node && node.textContent !== s) node.textContent = s;
  };
  F.attr = (node, k, v) => {
    if (node.getAttribute(k) !== String(v)) node.setAttribute(k, v);
  };
  F.replace = (node, ...children) => {
    node.replaceChildren(...children.flat(Infinity).filter(c => c !== null && c !== undefined && c !== false));
    return node;
  };
  F.num = (value, unit, cls = 'num') =>
    F.el('span', { class: cls }, value, unit ? F.el('span', { class: 'u' }, NB + unit) : null);
  const WORDS = {
    queued: 'Queued',
    starting: 'Starting',
    running: 'Running',
    paused: 'Paused',
    finished: 'Finished',
    stopped: 'Stopped',
    failed: 'Failed',
    lost: 'Lost',
  };
  F.stateWord = s => WORDS[s] || s;
  F.stateGlyph = s => {
    const g = F.svg('svg', { viewBox: '0 0 12 12', 'aria-hidden': 'true' });
    if (s === 'running')
      g.append(
        F.svg('circle', { class: 'pulse', cx: 6, cy: 6, r: 4, 'stroke-width': 1 }),
        F.svg('circle', { cx: 6, cy: 6, r: 3, fill: 'currentColor', stroke: 'none' }),
      );
    else g.append(F.svg('use', { href: '#s-' + s }));
    return g;
  };
  F.state = (s, words, cls = '') =>
    F.el('span', { class: 'ft-state ' + cls, 'data-s': s }, F.stateGlyph(s), words || WORDS[s] || s);
  const VERDICTS = { yes: 'i-check', noise: 'i-noise', no: 'i-cross', na: 'i-na' };
  F.verdict = (v, words, cls = '') => F.el('span', { class: 'ft-verdict ' + cls, 'data-v': v }, F.icon(VERDICTS[v]), words);
  F.note = (node, kind, ...children) => {
    const glyph = { bad: 'cross', warn: 'warn', good: 'check', info: 'info' }[kind] || 'info';
    const n = F.el(
      'div',
      { class: 'ft-note ' + kind, role: kind === 'bad' ? 'alert' : 'status' },
      F.icon(glyph),
      F.el('div', { class: 'grow' }, ...children),
    );
    if (node) node.replaceChildren(n);
    return n;
  };

  /* ---------- colours ---------- */
  let probe = null,
    cache = new Map();
  F.token = name => {
    if (cache.has(name)) return cache.get(name);
    if (!probe) {
      probe = document.createElement('i');
      probe.style.display = 'none';
      (document.body || document.documentElement).append(probe);
    }
    probe.style.color = `var(--ft-${name})`;
    const c = getComputedStyle(probe).color;
    if (document.body) cache.set(name, c);
    return c;
  };
  F.alpha = (color, a) => {
    const m = color.match(/[\d.]+/g);
    return m ? `rgba(${m[0]},${m[1]},${m[2]},${a})` : color;
  };
  const repaints = new Set();
  let wasDark = null;
  const themed = () => {
    const d = getComputedStyle(document.body).colorScheme + document.body.className.includes('dark') + window.fettleTheme.dark();
    if (d === wasDark) return;
    wasDark = d;
    cache.clear();
    for (const f of repaints)
      try {
        f();
      } catch (e) {
        console.error(e);
      }
  };
  F.onTheme = f => {
    repaints.add(f);
    return () => repaints.delete(f);
  };
  const start = () => {
    wasDark = getComputedStyle(document.body).colorScheme + document.body.className.includes('dark') + window.fettleTheme.dark();
    new MutationObserver(() => requestAnimationFrame(themed)).observe(document.body, {
      attributes: true,
      attributeFilter: ['class'],
    });
    new MutationObserver(() => requestAnimationFrame(themed)).observe(document.documentElement, {
      attributes: true,
      attributeFilter: ['class'],
    });
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => requestAnimationFrame(themed));
    /* the stylesheet arrives after the head: tokens read before it are wrong */
    new MutationObserver(() => cache.clear()).observe(document.head, { childList: true });
  };
  document.body ? start() : addEventListener('DOMContentLoaded', start);

  const DASH = ['solid', '6px,2px', '2px,2px', '8px,2px,2px,2px', '4px,3px'];
  const SYMBOL = ['circle', 'square', 'diamond', 'triangle-up', 'triangle-down'];
  F.run = slot => {
    const k = (((Math.round(slot) || 0) % 10) + 10) % 10;
    return {
      slot: k,
      css: `var(--ft-run-${k + 1})`,
      get color() {
        return F.token(`run-${k + 1}`);
      },
      dash: DASH[k % 5],
      symbol: SYMBOL[k % 5],
    };
  };

  /* ---------- Plotly basics; chart.js builds on them ---------- */
  let loading = null;
  F.plotly = () => {
    if (window.Plotly) return Promise.resolve(window.Plotly);
    return (loading ||= new Promise((ok, no) => {
      const s = document.createElement('script');
      s.src = window.FETTLE_PLOTLY;
      s.async = true;
      s.onload = () => ok(window.Plotly);
      s.onerror = () => {
        loading = null;
        no(new Error('plotly.js did not load'));
      };
      document.head.append(s);
    }));
  };
  F.CONFIG = {
    displayModeBar: false,
    responsive: false,
    doubleClick: 'reset',
    scrollZoom: false,
    showTips: false,
    displaylogo: false,
  };
  const merge = (a, b) => {
    for (const k in b)
      a[k] =
        b[k] && typeof b[k] === 'object' && !Array.isArray(b[k]) && a[k] && typeof a[k] === 'object'
          ? merge({ ...a[k] }, b[k])
          : b[k];
    return a;
  };
  F.merge = merge;
  const FONT = () => getComputedStyle(document.documentElement).getPropertyValue('--ft-font').trim() || 'sans-serif';
  F.layout = (extra = {}) => {
    const t = F.token,
      axis = {
        showgrid: true,
        gridcolor: t('grid'),
        zeroline: false,
        showline: false,
        ticks: '',
        ticklabelstandoff: 4,
        tickfont: { size: 11, color: t('ink-3') },
        title: { text: '' },
        fixedrange: false,
      };
    return merge(
      {
        font: { family: FONT(), size: 11, color: t('ink-3') },
        paper_bgcolor: 'rgba(0,0,0,0)',
        plot_bgcolor: 'rgba(0,0,0,0)',
        margin: { l: 44, r: 14, t: 22, b: 24, pad: 0 },
        showlegend: false,
        uirevision: 'keep',
        transition: { duration: 0 },
        dragmode: 'zoom',
        xaxis: {
          ...axis,
          showgrid: false,
          showline: true,
          linecolor: t('line-strong'),
          ticks: 'outside',
          ticklen: 5,
          tickcolor: t('line-strong'),
          minor: { ticks: 'outside', ticklen: 3, tickcolor: t('line-strong'), showgrid: false },
        },
        yaxis: { ...axis },
        hovermode: 'x unified',
        hoverlabel: {
          bgcolor: t('raised'),
          bordercolor: t('line-strong'),
          font: { family: FONT(), size: 11, color: t('ink') },
          align: 'left',
        },
      },
      extra,
    );
  };
  /* the region beyond a limit; layout shapes cannot be hatched, a filled trace can */
  F.hatch = (xs, ys) => ({
    type: 'scatter',
    x: xs,
    y: ys,
    fill: 'toself',
    mode: 'none',
    fillcolor: 'rgba(0,0,0,0)',
    hoverinfo: 'skip',
    showlegend: false,
    fillpattern: { shape: '/', size: 6, solidity: 0.12, fgcolor: F.token('ink'), bgcolor: 'rgba(0,0,0,0)' },
  });
})();
