/* Live: the run's time to scale: stages done, what the forecast still plans, evaluations, now, and the limit. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];

  F.livePanels.push((root, bus) => {
    const clock = root.querySelector('[data-t="clock"]'),
      names = clock.querySelector('.names'),
      track = clock.querySelector('.track'),
      ticks = clock.querySelector('.ticks');
    const span = (cls, a, b, extra = {}) =>
      F.el('i', { class: cls, ...extra, style: { '--a': a, ...(b === undefined ? {} : { '--b': b }), ...(extra.style || {}) } });
    /* when each stage and phase was, and will be if the forecast holds */
    const timeline = () => {
      const r = bus.run,
        now = bus.now(),
        done = [],
        plan = [],
        marks = [];
      const from = r.started;
      let at = 0;
      for (const s of bus.stages) {
        if (!s.started || !from) continue;
        const a = Math.min(now, Math.max(at, bus.at(s.started))),
          b = Math.min(now, s.ended ? Math.max(a, bus.at(s.ended)) : now);
        if (a > at) done.push({ a: at, b: a, c: `var(--ft-time-${done.length ? 'eval' : 'other'})` });
        done.push({ a, b, c: `var(--ft-time-${(s.index % 3) + 1})`, stage: s });
        marks.push({ a, stage: s });
        at = b;
      }
      if (at < now) done.push({ a: at, b: now, c: 'var(--ft-time-other)' });
      const phases = bus.forecast?.seconds?.phases || [];
      let p = 0,
        end = bus.total || 0;
      if (bus.live) {
        /* later than forecast: the rest of the plan moves behind now */
        const current = bus.stages.filter(s => s.started).length;
        const ahead = [];
        for (const f of phases) {
          const n = parseInt(f.phase, 10);
          ahead.push({ a: p, b: p + f.seconds, n: Number.isFinite(n) ? n : null, name: f.phase });
          p += f.seconds;
        }
        const mine = ahead.find(f => f.n === current && current),
          shift = mine && mine.b < now ? now - mine.b : 0;
        for (const f of ahead) {
          const a = Math.max(now, f.a + shift),
            b = f.b + shift;
          if (b <= a + 0.01) continue;
          plan.push({ a, b });
          const s = f.n && bus.stages[f.n - 1];
          if (s && !s.started) marks.push({ a, stage: s, planned: true });
        }
        end = plan.length ? plan.at(-1).b : 0;
      } else end = 0;
      return { now, done, plan, marks, end };
    };
    bus.timeline = timeline;
    const step = max =>
      [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400].find(s => max / s <= 14) || 172800;
    let drawn = '';
    const drawClock = () => {
      const r = bus.run;
      if (!r) return;
      const L = bus.limitSeconds,
        T = timeline();
      const max = Math.max(L ? L * 1.1 : 0, T.end * 1.03, T.now * 1.02, 5);
      const round = Math.round(T.now * 10) / 10;
      const stamp = [r.id, r.status, round, T.end.toFixed(1), bus.stages.length, bus.evaluations.length].join();
      if (stamp === drawn) return;
      drawn = stamp;
      clock.style.setProperty('--max', max);
      F.replace(
        track,
        T.done.map(s => span('seg done', s.a, s.b, { style: { '--c': s.c }, title: s.stage?.name })),
        T.plan.map(s => span('seg plan', s.a, s.b)),
        bus.evaluations.filter(e => e.t && e.t <= T.now + 1).map(e => span('ev', e.t, undefined, { title: 'Evaluation' })),
        L ? [span('over', L), span('lim', L)] : null,
        T.end ? span('fc', Math.min(T.end, max)) : null,
        bus.live && r.status !== 'queued' ? span('now', T.now) : null,
      );
      const progress = () => {
        const f = bus.forecast?.steps,
          at = bus.s('loss').step.at(-1);
        return at ? ` step ${F.whole(at)}${f && f >= at && bus.live ? ` of about ${F.whole(f)}` : ''}` : '';
      };
      const wide = names.clientWidth || 800,
        taken = [],
        marks = T.marks.sort((a, b) => a.a - b.a),
        shown = new Map();
      /* the stage that runs (or ran last) is named first, then as many others as there is room for */
      const first = marks.find(m => m.stage.status === 'running') || marks.filter(m => !m.planned).at(-1);
      const room = (x, w) => x >= 0 && x + w <= wide + 2 && taken.every(([a, b]) => x + w < a || x > b);
      const width = m => (marks[marks.indexOf(m) + 1]?.a ?? T.end) - m.a;
      for (const m of [first, ...marks.filter(m => m !== first).sort((a, b) => width(b) - width(a))]) {
        if (!m) continue;
        const active = m === first && m.stage.status === 'running',
          full = `${m.stage.index + 1} ${m.stage.name}`,
          rest = active && wide > 500 ? progress() : '';
        for (const [label, extra] of [
          [full, rest],
          [full, ''],
          [String(m.stage.index + 1), ''],
        ]) {
          const w = label.length * 6.3 + 18 + extra.length * 5.6,
            x = Math.max(0, Math.min((m.a / max) * wide, wide - w));
          if (!room(x, w)) continue;
          taken.push([x, x + w + 6]);
          shown.set(m, { x, label, extra, active });
          break;
        }
      }
      F.replace(
        names,
        marks
          .filter(m => shown.has(m))
          .map(m => {
            const { x, label, extra, active } = shown.get(m);
            return F.el(
              'span',
              { style: { '--a': (x / wide) * max }, title: m.stage.name },
              F.family(m.stage.family, 's'),
              active ? F.el('b', {}, label) : label,
              extra ? F.el('em', {}, extra) : null,
            );
          }),
      );
      const d = step(max),
        labels = [];
      const narrow = wide < 500,
        every = narrow ? 4 : 3;
      for (let s = 0, i = 0; s <= max; s += d, i++)
        labels.push(
          F.el(
            'span',
            { style: { '--a': s } },
            i % every === 0 && (!L || Math.abs(s - L) > max * (narrow ? 0.12 : 0.05)) && s < max * 0.97 ? F.clock(s) : '',
          ),
        );
      if (L)
        labels.push(
          F.el(
            'span',
            { class: 'lb', style: { '--a': L } },
            F.clock(L),
            F.el('span', { class: 'only-wide ft-plainlabel' }, ' limit'),
          ),
        );
      F.replace(ticks, labels);
      F.attr(
        clock,
        'aria-label',
        `Time used ${F.clock(T.now)}${L ? ` of ${F.clock(L)}` : ''}${T.end ? `, forecast end ${F.clock(T.end)}` : ''}`,
      );
    };

    bus.on('open', () => {
      drawn = '';
      if (bus.run) drawClock();
    });
    bus.on('tick', drawClock);
    bus.on('idle', drawClock);
    new ResizeObserver(() => {
      drawn = '';
      drawClock();
    }).observe(clock);
  });
})();
