/* Live: memory against its limit, throughput with the clocks of one step, learning rate and gradient norm. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];
  const GB = 1e9;
  const xmax = bus => {
    const L = bus.limitSeconds,
      now = bus.now();
    return bus.live ? Math.max(L ? L * 1.05 : 0, (bus.timeline ? bus.timeline().end : 0) * 1.03, now * 1.03, 5) : now * 1.03 || 5;
  };
  const running = bus => bus.live && bus.run.status !== 'queued' && bus.run.started;
  /* keeps one chart in step with some series: whole on open, increments on tick */
  const follow = (bus, chart, names, transform) => {
    const feed = (name, from) => {
      const s = bus.s(name);
      const part = transform ? transform(name, s, from) : { x: s.t.slice(from), y: s.value.slice(from) };
      return part;
    };
    const whole = () => {
      for (const n of names()) {
        const p = feed(n, 0);
        chart.put(n, p.x, p.y);
      }
    };
    bus.on('open', () => {
      chart.clear();
      whole();
      chart.rebuild();
    });
    bus.on('tick', (b, d) => {
      let fresh = false;
      for (const n of names()) {
        const from = d.changed.get(n);
        if (from === undefined) continue;
        if (chart.index && chart.live && chart.index(n) < 0) {
          fresh = true;
          continue;
        }
        if (from <= 0) {
          const p = feed(n, 0);
          chart.put(n, p.x, p.y);
        } else {
          const p = feed(n, from);
          chart.push(n, p.x, p.y);
        }
      }
      if (fresh) {
        whole();
        chart.rebuild();
      } else chart.flush();
    });
  };
  const register = (root, name, chart) => {
    root.fettleCharts = { ...(root.fettleCharts || {}), [name]: chart };
  };

  /* ---------- memory ---------- */
  const MEMORY = [
    ['mem/device', 'NVML device', 'mem-device', 0.9],
    ['mem/process', 'NVML process', 'mem-process', 0.85],
    ['mem/reserved', 'Reserved', 'mem-reserved', 0.85],
    ['mem/allocated', 'Allocated', 'mem-allocated', 0.92],
  ];
  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="memory"]');
    const gpu = () => MEMORY.filter(([n]) => bus.has(n));
    const limited = () => (bus.has('mem/process') ? 'NVML process' : bus.has('mem/reserved') ? 'reserved' : 'resident set');
    const limit = () => (F.finite(bus.limits.memory_gb) ? bus.limits.memory_gb : null);
    const peak = () => bus.forecast?.memory?.peak_bytes;
    const chart = new F.Chart(panel.querySelector('[data-chart="memory"]'), {
      id: 'live.memory',
      every: 600,
      aria: 'Memory over time with the budget line',
      traces: () => [
        ...gpu().map(([key, name, token, o]) => ({
          key,
          name,
          mode: 'lines',
          line: { width: 0.5, color: F.token(token), shape: 'hv' },
          fill: 'tozeroy',
          fillcolor: F.alpha(F.token(token), o),
          hovertemplate: `%{y:.2f}${F.NB}GB`,
        })),
        {
          key: 'mem/rss',
          name: 'Host RSS',
          mode: 'lines',
          line: {
            width: 1.75,
            color: F.token(gpu().length ? 'mem-rss' : 'mem-allocated'),
            dash: gpu().length ? '5px,3px' : 'solid',
          },
          ...(gpu().length ? {} : { fill: 'tozeroy', fillcolor: F.alpha(F.token('mem-allocated'), 0.28) }),
          hovertemplate: `%{y:.2f}${F.NB}GB`,
        },
      ],
      layout: () => ({ margin: { l: 36, r: 14, t: 22, b: 24 }, yaxis: { rangemode: 'tozero', tickformat: '.1f' } }),
      auto: c => {
        let top = 0;
        for (const d of c.full.values()) for (const y of d.y) if (y > top) top = y;
        return {
          x: [0, xmax(bus)],
          y: [0, Math.max(limit() ? limit() * 1.18 : 0, top * 1.15, ((peak() || 0) / GB) * 1.15, 0.1)],
        };
      },
      overlay: d => {
        if (!bus.run) return;
        if (limit()) d.limitY(limit(), `limit ${F.fixed(limit(), 2)}${F.NB}GB${d.narrow ? '' : ` on ${limited()}`}`);
        if (running(bus)) d.now(bus.now());
        if (peak() && bus.live)
          d.forecast(
            Math.max(bus.timeline?.().end || bus.total || 0, bus.now()),
            peak() / GB,
            d.narrow ? '' : `forecast ${F.fixed(peak() / GB, 2)}`,
          );
        else if (peak()) d.ref(peak() / GB, `forecast ${F.fixed(peak() / GB, 2)}`);
        const list = [
          ...gpu().map(([n, k]) => [n, k, '']),
          ['mem/rss', gpu().length ? 'Host RSS' : 'Resident set', gpu().length ? F.token('mem-rss') : ''],
        ];
        d.ends(
          list
            .filter(([n]) => bus.has(n))
            .map(([n, k, c]) => ({ x: bus.s(n).t.at(-1), y: bus.last(n) / GB, k, c, t: F.fixed(bus.last(n) / GB, 2) })),
        );
        if (!bus.has('mem/rss'))
          d.text(d.box.l + 12, d.box.b - 12, bus.live ? 'No figure yet' : 'No figures were recorded', 'ink2');
      },
    });
    register(root, 'memory', chart);
    const heads = () =>
      F.text(
        panel.querySelector('.sub'),
        gpu().length
          ? `GB, ${gpu().length + 1} figures${limit() ? ` and the limit on the ${limited()}` : ''}`
          : `GB, resident set of the run${limit() ? ' and its limit' : ''}`,
      );
    follow(
      bus,
      chart,
      () => [...MEMORY.map(m => m[0]), 'mem/rss'],
      (n, s, from) => ({ x: s.t.slice(from), y: s.value.slice(from).map(v => (v === null ? null : v / GB)) }),
    );
    bus.on('open', heads);
    bus.on('tick', (b, d) => {
      if (d.changed.has('mem/device')) heads();
    });
    const names = () => [...gpu().map(m => [m[0], m[1]]), ['mem/rss', 'Resident set']].filter(([n]) => bus.has(n));
    return F.panelTools(
      'memory',
      panel,
      bus,
      () => [
        { name: 'seconds', r: 1, f: v => F.fixed(v, 1) },
        ...names().map(([, k]) => ({ name: k, unit: 'bytes', r: 1, f: F.whole })),
      ],
      () => {
        const n = names(),
          first = bus.s(n[0]?.[0]);
        return first.t.map((t, i) => [
          t,
          ...n.map(([k]) => {
            const s = bus.s(k);
            return s.t[i] === t ? s.value[i] : s.value[Math.min(s.t.length - 1, F.bisect(s.t, t))];
          }),
        ]);
      },
    );
  });

  /* ---------- throughput, and where a step's time goes ---------- */
  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="rate"]'),
      clocks = panel.querySelector('[data-t="clocks"]');
    const name = () => (bus.has('samples_per_second') ? 'samples_per_second' : 'tokens_per_second');
    const what = () => (name() === 'samples_per_second' ? 'samples/s' : 'tokens/s');
    const forecast = () => bus.forecast?.stages?.find(s => s.steps && s.units_per_second)?.units_per_second ?? null;
    const color = () => F.run(bus.run?.slot || 0).color;
    /* evaluation and checkpoints leave gaps: nothing is drawn across them */
    const gaps = (n, s, from) => {
      const x = [],
        y = [];
      for (let i = from; i < s.t.length; i++) {
        if (i > 0) {
          const d = s.t[i] - s.t[i - 1],
            b = i > 1 ? s.t[i - 1] - s.t[i - 2] : d;
          if (d > 0.6 && d > 4 * b) {
            x.push(s.t[i - 1] + 0.001);
            y.push(null);
          }
        }
        x.push(s.t[i]);
        y.push(s.value[i]);
      }
      return { x, y };
    };
    const chart = new F.Chart(panel.querySelector('[data-chart="rate"]'), {
      id: 'live.rate',
      every: 600,
      aria: 'Throughput over time, with gaps during evaluation',
      traces: () => [
        {
          key: name(),
          name: what(),
          mode: 'lines',
          connectgaps: false,
          line: { width: 1.25, color: color() },
          hovertemplate: `%{y:,.4~s} ${what()}`,
        },
      ],
      layout: () => ({ margin: { l: 40, r: 16, t: 16, b: 24 }, yaxis: { tickformat: '~s', nticks: 4 } }),
      auto: c => {
        const d = c.full.get(name());
        const top = Math.max(d ? F.quantile(d.y, 0.99) || 0 : 0, forecast() || 0);
        return { x: [0, xmax(bus)], y: [0, (top || 1) * 1.2] };
      },
      overlay: d => {
        if (!bus.run) return;
        for (const e of bus.evaluations)
          if (e.extra?.seconds && e.t) {
            const a = Math.max(d.box.l, d.X(e.t - e.extra.seconds)),
              b = Math.min(d.box.r, d.X(e.t));
            if (b - a > 0.5) d.add('rect', { x: a, y: d.box.t, width: Math.max(1.5, b - a), height: d.box.h, class: 'gap' });
          }
        if (forecast()) {
          d.dashed(forecast());
          if (bus.live)
            d.forecast(bus.timeline?.().end || bus.now(), forecast(), d.narrow ? '' : `forecast ${F.count(forecast())}`);
          else d.text(d.box.r - 2, d.Y(forecast()) + 14, `forecast ${F.count(forecast())}`, '', 'end');
        }
        if (running(bus)) d.now(bus.now());
        const s = bus.s(name()),
          m = F.median(s.value.slice(-20));
        if (F.finite(m)) d.ends([{ x: s.t.at(-1), y: m, k: '', t: F.count(m) }]);
        else d.text(d.box.l + 12, d.box.t + 18, bus.live ? 'No training step yet' : 'This run trained nothing', 'ink2');
      },
    });
    register(root, 'rate', chart);
    follow(bus, chart, () => ['tokens_per_second', 'samples_per_second'], gaps);
    const PARTS = [
      ['time/data', 'data', 'var(--ft-time-other)'],
      ['time/forward', 'forward', 'var(--ft-time-1)'],
      ['time/backward', 'backward', 'var(--ft-time-2)'],
      ['time/step', 'step', 'var(--ft-time-eval)'],
    ];
    const bar = () => {
      F.text(panel.querySelector('.sub'), what());
      const parts = PARTS.map(([n, w, c]) => [w, F.median(bus.s(n).value.slice(-100)), c]).filter(p => F.finite(p[1]));
      const whole = parts.reduce((a, p) => a + p[1], 0);
      clocks.hidden = !whole;
      if (!whole) return;
      const ms = s => F.fig(1000 * s);
      if (!clocks.firstChild)
        F.replace(
          clocks,
          F.el('p', { class: 'ft-h' }, 'One step', F.el('span', { class: 'sub num' })),
          F.el(
            'div',
            { class: 'bar' },
            PARTS.map(p => F.el('i', { style: `background:${p[2]}` + (p[1] === 'step' ? ';color:var(--ft-ink)' : '') })),
          ),
          F.el('p', { class: 'mi dim num' }),
        );
      F.text(
        clocks.querySelector('.sub'),
        `${ms(whole)}${F.NB}ms, median of the last ${Math.min(100, bus.s('time/forward').value.length)}`,
      );
      [...clocks.querySelectorAll('.bar i')].forEach((n, i) => {
        const p = parts.find(q => q[0] === PARTS[i][1]);
        n.style.flex = String(Math.max(0.2, (100 * (p ? p[1] : 0)) / whole));
        F.text(n, p && p[1] / whole > 0.17 ? `${p[0]} ${ms(p[1])}` : '');
        n.title = p ? `${p[0]} ${ms(p[1])} ms` : '';
      });
      F.text(
        clocks.lastChild,
        parts
          .filter(p => p[1] / whole <= 0.17)
          .map(p => `${p[0]} ${ms(p[1])}${F.NB}ms`)
          .join(', '),
      );
    };
    bus.on('open', () => {
      clocks.replaceChildren();
      bar();
    });
    bus.on('tick', (b, d) => {
      if (d.changed.has('time/forward') || d.changed.has(name())) bar();
    });
    return F.panelTools(
      'rate',
      panel,
      bus,
      () => [
        { name: 'step', r: 1, f: F.whole },
        { name: 'seconds', r: 1, f: v => F.fixed(v, 2) },
        { name: what(), r: 1, f: v => F.fig(v, 4) },
      ],
      () => {
        const s = bus.s(name());
        return s.step.map((st, i) => [st, s.t[i], s.value[i]]);
      },
    );
  });

  /* ---------- learning rate and gradient norm on one x ---------- */
  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="steps"]');
    const color = () => F.run(bus.run?.slot || 0).color,
      clip = () => bus.run?.spec?.training?.clip ?? 1;
    const chart = new F.Chart(panel.querySelector('[data-chart="steps"]'), {
      id: 'live.steps',
      every: 600,
      aria: 'Learning rate, and gradient norm on a logarithmic scale',
      traces: () => [
        { key: 'lr', name: 'rate', mode: 'lines', line: { width: 1.5, color: color() }, hovertemplate: '%{y:.3~g}' },
        {
          key: 'grad_norm',
          name: 'gradient norm',
          yaxis: 'y2',
          mode: 'lines',
          line: { width: 1, color: color() },
          hovertemplate: '%{y:.3~g}',
        },
      ],
      layout: () => {
        const l = F.layout();
        return {
          margin: { l: 42, r: 14, t: 16, b: 24 },
          xaxis: { anchor: 'y2' },
          yaxis: { domain: [0.6, 1], tickformat: '.1~e', nticks: 3, rangemode: 'tozero' },
          yaxis2: { ...l.yaxis, domain: [0, 0.44], type: 'log', dtick: 1, nticks: 4, tickformat: '~g', anchor: 'x' },
        };
      },
      auto: c => {
        const lr = c.full.get('lr'),
          g = c.full.get('grad_norm'),
          top = lr?.y.length ? Math.max(...lr.y.filter(F.finite)) : 0;
        const lo = g?.y.length ? F.quantile(g.y, 0.002) : null,
          hi = g?.y.length ? F.quantile(g.y, 0.999) : null;
        const log = v => Math.log10(Math.max(v, 1e-8));
        return {
          x: [0, xmax(bus)],
          y: [0, (top || 1e-3) * 1.15],
          y2: lo ? F.nice(Math.min(log(lo), log(clip() || lo)), Math.max(log(hi), log(clip() || hi)), 0.12) : [-1, 1],
        };
      },
      overlay: d => {
        if (!bus.run) return;
        if (clip() && bus.has('grad_norm')) d.ref(clip(), `clip at ${F.fig(clip(), 2)}`, 'l', '2');
        if (running(bus)) d.now(bus.now());
        const lr = bus.s('lr'),
          g = bus.s('grad_norm');
        if (lr.t.length) d.ends([{ x: lr.t.at(-1), y: lr.value.at(-1), k: '', t: F.fig(lr.value.at(-1), 2) }]);
        if (g.t.length) d.ends([{ x: g.t.at(-1), y: F.median(g.value.slice(-5)), n: '2', k: '', t: F.fig(g.value.at(-1), 2) }]);
        if (!lr.t.length)
          d.text(d.box.l + 12, d.box.t + 18, bus.live ? 'No training step yet' : 'This run trained nothing', 'ink2');
      },
    });
    register(root, 'steps', chart);
    follow(bus, chart, () => ['lr', 'grad_norm']);
    return F.panelTools(
      'steps',
      panel,
      bus,
      () => [
        { name: 'step', r: 1, f: F.whole },
        { name: 'seconds', r: 1, f: v => F.fixed(v, 2) },
        { name: 'learning rate', r: 1, f: v => F.fig(v) },
        { name: 'gradient norm', r: 1, f: v => F.fig(v) },
      ],
      () => {
        const a = bus.s('lr'),
          g = bus.s('grad_norm');
        return a.step.map((st, i) => [st, a.t[i], a.value[i], g.value[i]]);
      },
    );
  });
})();
