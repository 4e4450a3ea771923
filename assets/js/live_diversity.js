/* Live: sign diversity of the layers' inputs (spectral alignment), shown only where it is measured. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];
  const LOWEST = 'sign_diversity',
    MEDIAN = 'sign_diversity_median';

  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="diversity"]'),
      sub = panel.querySelector('.sub');
    const color = () => F.run(bus.run?.slot || 0).color,
      bound = () => bus.run?.spec?.training?.switches?.find(s => s.method === 'spectral-alignment')?.low ?? 0.05;
    const chart = new F.Chart(panel.querySelector('[data-chart="diversity"]'), {
      id: 'live.diversity',
      every: 600,
      aria: 'Sign diversity over time: the lowest matrix and the median one, with the bound of the alarm',
      traces: () => [
        { key: LOWEST, name: 'lowest', mode: 'lines', line: { width: 1.5, color: color() }, hovertemplate: '%{y:.3f}' },
        { key: MEDIAN, name: 'median', mode: 'lines', line: { width: 1, color: color(), dash: '4px,3px' }, hovertemplate: '%{y:.3f}' },
      ],
      layout: () => ({ margin: { l: 40, r: 60, t: 12, b: 24 }, yaxis: { tickformat: '.1f', nticks: 4 } }),
      auto: () => ({ x: [0, bus.live ? Math.max(bus.timeline?.().end || 0, bus.now() * 1.03, 5) : bus.now() || 5], y: [0, 0.52] }),
      overlay: d => {
        if (!bus.run) return;
        d.ref(bound(), `alarm below ${F.fig(bound(), 2)}`, 'l');
        for (const e of bus.events) if (e.kind === 'alarm' && !e.data?.over) d.add('line', { x1: d.X(bus.at(e.t)), x2: d.X(bus.at(e.t)), y1: d.box.t, y2: d.box.t + d.box.h, class: 'limit' });
        const ends = [LOWEST, MEDIAN].map((n, i) => [bus.s(n), i ? 'median' : 'lowest']).filter(([s]) => s.t.length);
        d.ends(ends.map(([s, k]) => ({ x: s.t.at(-1), y: s.value.at(-1), k, t: F.fig(s.value.at(-1), 2) })));
      },
    });
    root.fettleCharts = { ...(root.fettleCharts || {}), diversity: chart };
    let shown = null;
    const paint = () => {
      const has = bus.has(MEDIAN);
      if (shown !== has) panel.hidden = !has;
      if (has)
        for (const n of [LOWEST, MEDIAN]) {
          const s = bus.s(n);
          chart.put(n, s.t, s.value);
        }
      if (has && shown !== has) chart.rebuild();
      else if (has) chart.flush();
      shown = has;
      F.text(sub, 'share of the rarer sign along each weight\u2019s leading direction; lowest of the matrices that had mixed signs');
    };
    bus.on('open', () => {
      shown = null;
      chart.clear();
      paint();
    });
    bus.on('tick', (b, d) => {
      if (d.changed.has(MEDIAN)) paint();
    });
    return F.panelTools(
      'diversity',
      panel,
      bus,
      () => [
        { name: 'step', r: 1, f: F.whole },
        { name: 'seconds', r: 1, f: v => F.fixed(v, 2) },
        { name: 'lowest', r: 1, f: v => F.fig(v, 3) },
        { name: 'median', r: 1, f: v => F.fig(v, 3) },
      ],
      () => {
        const a = bus.s(LOWEST),
          m = bus.s(MEDIAN);
        return m.step.map((st, i) => [st, m.t[i], a.value[a.step.indexOf(st)] ?? null, m.value[i]]);
      },
    );
  });
})();
