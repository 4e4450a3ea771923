/* Live: the loss, raw and smoothed, with evaluations, stages, the base and the limit on one axis. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];

  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="loss"]'),
      sub = panel.querySelector('.sub');
    const slider = panel.querySelector('.ft-slim'),
      sliderText = panel.querySelector('.ft-smooth .num');
    let axis = F.keep('live.x', 't'),
      vertical = F.keep('live.y', 'loss'),
      smooth = F.keep('live.smooth', 0.9),
      ema = F.ema(smooth),
      fed = 0;
    slider.value = Math.round(smooth * 100);
    F.text(sliderText, smooth.toFixed(2));

    const color = () => F.run(bus.run?.slot || 0).color;
    const lm = () => !bus.evaluations.some(e => e.metric === 'accuracy') && !bus.has('samples_per_second');
    const metric = () => bus.run?.metric || bus.evaluations.at(-1)?.metric || 'metric';
    const unit = () => (vertical === 'metric' ? (metric() === 'accuracy' ? '%' : metric()) : lm() ? 'nats/token' : 'nats');
    /* position of a point on the chosen axis; by step for tokens, by time for energy */
    const lookup = (xs, ys, v) => {
      if (!xs.length) return null;
      const i = Math.min(xs.length - 1, F.bisect(xs, v));
      if (i === 0 || xs[i] === v) return ys[i];
      const q = (v - xs[i - 1]) / (xs[i] - xs[i - 1] || 1);
      return ys[i - 1] + Math.min(1, q) * (ys[i] - ys[i - 1]);
    };
    const place = (step, t) =>
      axis === 't'
        ? t
        : axis === 'step'
          ? step
          : axis === 'tokens'
            ? lookup(bus.s('tokens').step, bus.s('tokens').value, step)
            : lookup(bus.s('energy/joules').t, bus.s('energy/joules').value, t);
    const ends = () =>
      ({ t: bus.limitSeconds, step: bus.limits.steps, tokens: bus.limits.tokens, joules: bus.limits.joules })[axis] ?? null;
    const plan = () =>
      ({
        t: bus.live ? Math.max(bus.total || 0, bus.timeline ? bus.timeline().end : 0) : 0,
        step: bus.live ? bus.forecast?.steps : 0,
        tokens: bus.live ? bus.forecast?.tokens : 0,
      })[axis] || 0;
    const nowX = () => (axis === 't' ? bus.now() : (chart.full.get('raw')?.x.at(-1) ?? 0));
    const evals = () =>
      bus.evaluations
        .filter(e => F.finite(e.value) && (vertical === 'metric' || F.finite(e.extra?.loss)))
        .map(e => {
          const k =
            metric() === 'accuracy' ? (vertical === 'metric' ? 100 : null) : vertical === 'metric' ? 1 : e.extra.loss / e.value;
          const y = vertical === 'metric' ? e.value * (k || 1) : e.extra.loss;
          return { e, x: place(e.step, e.t), y, low: k ? y - e.low * k : 0, high: k ? e.high * k - y : 0 };
        })
        .filter(p => F.finite(p.x));
    const base = () => evals().find(p => p.e.stage < 0);

    const chart = new F.Chart(panel.querySelector('[data-chart="loss"]'), {
      id: 'live.loss',
      aria: 'Training loss, smoothed loss and evaluations with 95 % intervals',
      traces: () => {
        const c = color();
        return [
          {
            key: 'raw',
            name: 'train',
            mode: 'lines',
            line: { width: 1, color: c, shape: 'linear' },
            opacity: 0.28,
            hovertemplate: '%{y:.4f}',
          },
          { key: 'smooth', name: 'smoothed', mode: 'lines', line: { width: 2, color: c }, hovertemplate: '%{y:.4f}' },
          {
            key: 'eval',
            name: 'evaluation',
            mode: vertical === 'metric' ? 'lines+markers' : 'markers',
            line: { width: 1.5, color: c },
            marker: { color: c, size: 7, symbol: F.run(bus.run?.slot || 0).symbol, line: { width: 0 } },
            error_y: { type: 'data', symmetric: false, array: [], arrayminus: [], color: c, thickness: 1.25, width: 3 },
            hovertemplate: '%{y:.4f} %{text}',
          },
        ];
      },
      layout: () => ({ margin: { l: 42, r: 16, t: 24, b: 24 } }),
      auto: c => {
        const raw = c.full.get('raw'),
          sm = c.full.get('smooth'),
          ev = evals();
        let xmax = Math.max(ends() ? ends() * 1.05 : 0, plan() * 1.03, nowX() * 1.03, axis === 't' ? 5 : 10);
        // ended long before its limit: the limit is on the clock above
        if (!bus.live && ends() && nowX() < ends() * 0.6) xmax = nowX() * 1.05;
        const ys = ev.flatMap(p => [p.y - p.low, p.y + p.high]);
        if (vertical === 'loss' && sm?.y.length) {
          const head = Math.min(3, sm.y.length - 1);
          ys.push(
            ...[
              F.quantile(raw.y, 0.003),
              F.quantile(raw.y, 0.996),
              F.quantile(sm.y.slice(head), 0),
              F.quantile(sm.y.slice(head), 1),
            ].filter(F.finite),
          );
        }
        return { x: [0, xmax], y: ys.length ? F.nice(Math.min(...ys), Math.max(...ys), 0.07) : [0, 1] };
      },
      overlay: d => {
        if (!bus.run) return;
        const now = nowX(),
          limit = ends();
        if (axis === 't' && bus.timeline)
          for (const s of bus.timeline().done)
            if (s.stage) {
              const a = Math.max(d.box.l, d.X(s.a)),
                b = Math.min(d.box.r, d.X(s.b));
              if (b - a < 1) continue;
              d.add('rect', { x: a, y: d.box.t, width: b - a, height: d.box.h, class: 'band' });
              if (b - a > 46) d.text(a + 3, d.box.t - 8, `${s.stage.index + 1} ${s.stage.name}`, 'ink2');
            }
        const b0 = base();
        if (b0) d.ref(b0.y, `base ${vertical === 'metric' ? F.pct(metric(), b0.e.value) : F.fig(b0.y, 4)}`);
        for (const e of bus.events)
          if (e.kind === 'checkpoint') {
            const x = axis === 't' ? bus.at(e.t) : place(e.data.step, 0);
            if (F.finite(x)) d.mark(x);
          }
        if (limit) d.limitX(limit, axis === 't' ? F.clock(limit) : F.count(limit));
        if (bus.live && bus.run.status !== 'queued' && bus.run.started) d.now(now);
        const sm = chart.full.get('smooth'),
          last = sm?.y.length ? sm.y.at(-1) : null,
          ev = evals().at(-1),
          list = [];
        if (vertical === 'loss' && F.finite(last)) list.push({ x: sm.x.at(-1), y: last, t: `train ${F.fig(last, 4)}` });
        if (ev)
          list.push({
            x: Math.max(ev.x, (vertical === 'loss' && sm?.x.at(-1)) || 0),
            y: ev.y,
            k: '',
            t: [
              d.narrow ? 'eval' : 'evaluation',
              vertical === 'metric' ? F.pct(metric(), ev.e.value) : F.fig(ev.y, 4),
              ev.high && !d.narrow ? `± ${F.fig((ev.low + ev.high) / 2, 2)}` : '',
            ]
              .join(' ')
              .trim(),
          });
        d.ends(list);
        if (!F.finite(last) && !ev)
          d.text(
            d.box.l + 12,
            d.box.t + 20,
            bus.live ? (bus.run.phase ? `No point yet: ${bus.run.phase}` : 'No point yet') : 'This run recorded no loss',
            'ink2',
          );
      },
    });
    chart.clock = axis === 't';
    chart.axis = axis;
    chart.zoom = F.keep(chart.key(), null);
    root.fettleCharts = { ...(root.fettleCharts || {}), loss: chart };

    const smoothed = (ys, from) => {
      const out = new Array(ys.length - from);
      for (let i = from; i < ys.length; i++) out[i - from] = ema.next(ys[i]);
      return out;
    };
    const putEvals = () => {
      const ev = evals();
      chart.put(
        'eval',
        ev.map(p => p.x),
        ev.map(p => p.y),
        {
          'error_y.array': ev.map(p => p.high),
          'error_y.arrayminus': ev.map(p => p.low),
          text: ev.map(p => `(${p.e.name === 'during' ? '' : p.e.name + ', '}n = ${p.e.n})`),
        },
      );
    };
    const all = () => {
      const s = bus.s('loss');
      ema = F.ema(smooth);
      const show = vertical === 'loss',
        xs = show ? s.step.map((st, i) => place(st, s.t[i])) : [];
      chart.put('raw', xs, show ? s.value.slice() : []);
      chart.put('smooth', xs.slice(), show ? smoothed(s.value, 0) : []);
      fed = s.step.length;
      putEvals();
    };
    const heads = () => {
      F.text(panel.querySelector('h2'), vertical === 'metric' ? (metric() === 'accuracy' ? 'Accuracy' : 'Evaluation') : 'Loss');
      F.text(sub, unit());
      sub.title = vertical === 'metric' && metric() === 'accuracy' ? 'Higher is better' : 'Lower is better';
      for (const b of panel.querySelectorAll('[data-seg="x"] button')) {
        b.setAttribute('aria-pressed', b.dataset.v === axis);
        b.disabled = (b.dataset.v === 'tokens' && !bus.has('tokens')) || (b.dataset.v === 'joules' && !bus.has('energy/joules'));
        b.title = b.disabled ? (b.dataset.v === 'joules' ? 'No energy counter here' : 'No tokens counted yet') : '';
      }
      for (const b of panel.querySelectorAll('[data-seg="y"] button')) {
        b.setAttribute('aria-pressed', b.dataset.v === vertical);
        if (b.dataset.v === 'metric') F.text(b, metric() === 'metric' ? 'metric' : metric());
      }
      panel.querySelector('.ft-smooth').style.visibility = vertical === 'metric' ? 'hidden' : '';
    };
    bus.on('open', () => {
      if ((axis === 'joules' && !bus.has('energy/joules')) || (axis === 'tokens' && !bus.has('tokens'))) axis = 't';
      heads();
      all();
      chart.ranges = {};
      chart.rebuild({ clock: axis === 't', axis });
    });
    bus.on('tick', (b, d) => {
      const from = d.changed.get('loss');
      if (from !== undefined) {
        if (from < 0 || from !== fed) all();
        else if (vertical === 'loss') {
          const s = bus.s('loss'),
            xs = [];
          for (let i = from; i < s.step.length; i++) xs.push(place(s.step[i], s.t[i]));
          chart.push('raw', xs, s.value.slice(from));
          chart.push('smooth', xs, smoothed(s.value, from));
          fed = s.step.length;
        } else fed = bus.s('loss').step.length;
      }
      if (d.evaluations || d.state) {
        putEvals();
        heads();
      } else if (d.changed.has('tokens') || d.changed.has('energy/joules')) heads();
      chart.flush();
    });
    bus.on('idle', () => {
      if (bus.run?.status === 'running' && chart.live) chart.paint();
    });
    slider.addEventListener('input', () => {
      smooth = slider.value / 100;
      F.text(sliderText, smooth.toFixed(2));
      F.keep.set('live.smooth', smooth);
      all();
      chart.flush();
    });
    panel.addEventListener('click', e => {
      const b = e.target.closest('[data-seg] button');
      if (!b || b.disabled) return;
      if (b.parentNode.dataset.seg === 'x') {
        axis = b.dataset.v;
        F.keep.set('live.x', axis);
      } else {
        vertical = b.dataset.v;
        F.keep.set('live.y', vertical);
        chart.zoom = null;
        F.keep.set(chart.key(), undefined);
        chart.ranges = {};
      }
      chart.axis = axis;
      heads();
      all();
      chart.rebuild({ clock: axis === 't', axis });
    });

    const rows = () => {
      const s = bus.s('loss'),
        tokens = bus.s('tokens'),
        ev = new Map(bus.evaluations.map(e => [e.step, e]));
      const list = s.step.map((st, i) => [st, s.t[i], lookup(tokens.step, tokens.value, st), s.value[i], null]);
      for (const e of bus.evaluations) list.push([e.step, e.t, lookup(tokens.step, tokens.value, e.step), null, e.value]);
      return list.sort((a, b) => a[1] - b[1]);
    };
    const columns = () => [
      { name: 'step', r: 1, f: F.whole },
      { name: 'seconds', r: 1, f: v => F.fixed(v, 2) },
      { name: 'tokens', r: 1, f: F.whole },
      { name: 'train loss', unit: lm() ? 'nats/token' : 'nats', r: 1, f: v => F.fig(v, 5) },
      { name: metric(), r: 1, f: v => F.fig(v, 4) },
    ];
    return F.panelTools('loss', panel, bus, columns, rows);
  });

  /* "show as table" and CSV of a panel: the same data as the chart */
  F.panelTools = (name, panel, bus, columns, rows) => {
    let box = null;
    const fill = () => {
      const all = rows();
      F.replace(
        box,
        F.table(columns(), all.slice(-400).reverse()),
        all.length > 400
          ? F.el('p', { class: 'mi dim ft-tablenote' }, `The last 400 of ${F.whole(all.length)} rows; CSV has all.`)
          : null,
      );
    };
    bus.on(
      'tick',
      F.debounce(() => {
        if (box) fill();
      }, 500),
    );
    /* the page holds a long past thinned; the file has every point */
    const csv = async () => {
      const all = await bus.call('points', { run: bus.run.id, names: [...bus.series.keys()] });
      const thinned = bus.series;
      bus.series = new Map(Object.entries(all));
      try {
        F.csv(`${bus.run.name}-${name}.csv`, columns(), rows());
      } finally {
        bus.series = thinned;
      }
    };
    return {
      do(what, where, button) {
        if (where !== name) return;
        if (what === 'csv') csv();
        if (what === 'table') {
          if (box) {
            box.remove();
            box = null;
          } else {
            box = F.el('div', { class: 'ft-tablebox', tabindex: 0 });
            panel.querySelector('.ft-body').append(box);
            fill();
          }
          button.setAttribute('aria-pressed', !!box);
          panel.classList.toggle('as-table', !!box);
        }
      },
    };
  };
})();
