/* Live: what the device does, what happened, what the log says. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];

  /* ---------- device strips ---------- */
  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="device"]'),
      box = panel.querySelector('[data-t="strips"]');
    const cores = () => bus.machine?.cores || null;
    const ALL = [
      ['gpu/util', 'Utilisation', v => [F.fig(v, 2), '%'], () => [0, 100]],
      ['gpu/power', 'Power', v => [F.fig(v), 'W'], () => [0, null]],
      ['gpu/temperature', 'Temperature', v => [F.fig(v, 2), '°C'], () => [20, 90]],
      ['gpu/clock', 'SM clock', v => [F.whole(v), 'MHz'], () => [0, null]],
      [
        'cpu/percent',
        'Processor',
        v => (cores() ? [F.fig(v / 100, 2), `of ${cores()} core${cores() === 1 ? '' : 's'}`] : [F.fig(v, 3), '%']),
        () => [0, cores() ? cores() * 100 : null],
      ],
      ['mem/rss', 'Resident set', v => [F.fixed(v / 1e9, 2), 'GB'], () => [0, null]],
      ['energy/joules', 'Energy', v => (v >= 1000 ? [F.fig(v / 1000), 'kJ'] : [F.fig(v), 'J']), () => [0, null]],
    ];
    const shown = () => ALL.filter(([n]) => bus.has(n));
    let built = '',
      strips = new Map();
    const draw = (name, spec, node) => {
      const s = bus.s(name),
        w = Math.floor(node.clientWidth),
        h = 26;
      if (w < 20) return;
      const p = F.decimate(s.t, s.value, 0, s.t.length, w),
        t0 = 0,
        t1 = Math.max(bus.now(), p.x.at(-1) || 1);
      let [lo, hi] = spec();
      if (hi === null) {
        hi = 0;
        for (const v of p.y) if (v > hi) hi = v;
        hi = hi * 1.1 || 1;
      }
      const X = t => ((t - t0) / (t1 - t0)) * w,
        Y = v => h - 2 - Math.max(0, Math.min(1, (v - lo) / (hi - lo))) * (h - 5);
      let d = '';
      p.x.forEach((t, i) => {
        if (p.y[i] !== null) d += `${d ? 'L' : 'M'}${X(t).toFixed(1)} ${Y(p.y[i]).toFixed(1)}`;
      });
      const svg = node.firstChild;
      svg.setAttribute('viewBox', `0 0 ${w} ${h}`);
      svg.setAttribute('width', w);
      svg.children[0].setAttribute('x2', w);
      svg.children[1].setAttribute('d', d && `${d}L${X(p.x.at(-1)).toFixed(1)} ${h - 2}L${X(p.x[0]).toFixed(1)} ${h - 2}Z`);
      svg.children[2].setAttribute('d', d);
    };
    const paint = () => {
      if (!bus.run) return;
      const m = bus.machine || {},
        list = shown(),
        stamp = list.map(x => x[0]).join() + bus.run.id;
      F.text(
        panel.querySelector('.sub'),
        m.gpu ? `${m.device}, driver counters` : `${m.device || 'CPU'}, counters of the run's process`,
      );
      if (stamp !== built) {
        built = stamp;
        strips = new Map();
        F.replace(
          box,
          list.map(([n, title]) => {
            const c = F.el(
                'div',
                { class: 'ft-chart' },
                F.svg(
                  'svg',
                  { height: 26, role: 'img', 'aria-label': title },
                  F.svg('line', { x1: 0, y1: 24.5, y2: 24.5, class: 'axis' }),
                  F.svg('path', { class: 'fillpath' }),
                  F.svg('path', { class: 'linepath' }),
                ),
              ),
              v = F.el('span', { class: 'v num' }, F.el('b', {}), F.el('span', { class: 'u' }));
            strips.set(n, { c, v });
            return F.el('div', { class: 's' }, F.el('span', { class: 'n' }, title), c, v);
          }),
          !list.some(x => x[0].startsWith('gpu/')) && !m.gpu
            ? F.el(
                'div',
                { class: 'ft-nogpu' },
                F.el('b', {}, 'No GPU figures on this machine. '),
                `${(m.reason || 'No NVIDIA driver answered').replace(/\.$/, '')}. `,
                "Memory is the resident set of the run's process, from psutil.",
              )
            : null,
          !list.length ? F.el('div', { class: 'ft-nogpu dim' }, bus.live ? 'No figure yet.' : 'No figures were recorded.') : null,
        );
      }
      for (const [n, , f, d] of list) {
        const s = strips.get(n),
          v = bus.last(n);
        if (v === null) continue;
        const [a, u] = f(v);
        F.text(s.v.firstChild, a);
        F.text(s.v.lastChild, F.NB + u);
        draw(n, d, s.c);
      }
    };
    let due = 0;
    const slow = () => {
      if (due) return;
      due = setTimeout(() => {
        due = 0;
        paint();
      }, 400);
    };
    bus.on('open', () => {
      built = '';
      paint();
    });
    bus.on('tick', (b, d) => {
      if ([...d.changed.keys()].some(k => k.includes('/'))) slow();
    });
    new ResizeObserver(slow).observe(box);
    return F.panelTools(
      'device',
      panel,
      bus,
      () => [
        { name: 'seconds', r: 1, f: v => F.fixed(v, 1) },
        ...shown().map(([n, k]) => ({ name: k, unit: bus.units[n], r: 1, f: v => F.fig(v, 4) })),
      ],
      () => {
        const n = shown().map(x => x[0]),
          first = bus.s(n[0]);
        return first.t.map((t, i) => [
          t,
          ...n.map(k => {
            const s = bus.s(k);
            return s.t[i] === t ? s.value[i] : (s.value[Math.min(s.t.length - 1, F.bisect(s.t, t))] ?? null);
          }),
        ]);
      },
    );
  });

  /* ---------- events ---------- */
  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="events"]'),
      list = panel.querySelector('[data-t="events"]');
    const ICON = {
      evaluation: 'eval',
      checkpoint: 'save',
      warning: 'warn',
      memory: 'warn',
      alarm: 'warn',
      freeze: 'pause',
      budget: 'flag',
      failed: 'cross',
      error: 'cross',
      lost: 'warn',
      stage: 'play',
      choice: 'check',
      started: 'play',
      finished: 'check',
      stopped: 'stop',
      stop: 'stop',
      pause: 'pause',
      resume: 'play',
      queued: 'clock',
    };
    const WARN = new Set(['warning', 'alarm', 'memory', 'failed', 'error', 'lost', 'budget']);
    const unit = e => (e.metric === 'accuracy' ? '%' : e.metric);
    const paint = () => {
      const items = bus.events
        .filter(e => e.kind !== 'log')
        .map(e => ({ t: bus.at(e.t), order: e.t, kind: e.kind, text: e.text, id: e.id }));
      if (!bus.events.some(e => e.kind === 'evaluation'))
        for (const e of bus.evaluations)
          if (F.finite(e.value)) {
            const when =
              e.name === 'during'
                ? ''
                : e.stage < 0
                  ? ', the model as it came'
                  : bus.stages[e.stage]
                    ? `, after ${bus.stages[e.stage].name}`
                    : '';
            items.push({
              t: e.t,
              order: (bus.run.started || 0) + e.t,
              kind: 'evaluation',
              text: `Evaluation ${F.pct(e.metric, e.value)}${F.NB}${unit(e)}, n${F.NB}=${F.NB}${F.whole(e.n)}${when}`,
              id: 'e' + e.id,
            });
          }
      items.sort((a, b) => b.order - a.order);
      F.text(panel.querySelector('.sub'), items.length ? String(items.length) : '');
      const kept = new Map([...list.children].map(n => [n.dataset.id, n]));
      F.replace(
        list,
        items.slice(0, 200).map(i => {
          const old = kept.get(String(i.id));
          if (old) {
            F.text(old.firstChild, F.clock1(i.t));
            return old;
          }
          return F.el(
            'li',
            { 'data-id': String(i.id), class: WARN.has(i.kind) ? 'warned' : null },
            F.el('time', {}, F.clock1(i.t)),
            F.icon(ICON[i.kind] || 'info'),
            F.el('span', {}, i.text),
          );
        }),
      );
      if (!items.length)
        F.replace(list, F.el('li', { class: 'nothing' }, F.el('span', { class: 'dim' }, 'Nothing has happened yet.')));
    };
    bus.on('open', paint);
    bus.on('tick', (b, d) => {
      if (d.events || d.evaluations || d.state) paint();
    });
  });

  /* ---------- log ---------- */
  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="log"]'),
      pre = panel.querySelector('[data-t="log"]'),
      sub = panel.querySelector('.sub');
    let following = true,
      shown = 0;
    const bad = /\w+Error\b|\berror:|Traceback|\bfailed\b/;
    const cls = line => (/\b(warning|warn:)\b/i.test(line) ? 'warn' : bad.test(line) ? 'bad' : '');
    const line = s => F.el('span', { class: 'l ' + cls(s) }, s + '\n');
    const follow = () => {
      if (following)
        requestAnimationFrame(() => {
          pre.scrollTop = pre.scrollHeight;
        });
      F.text(
        sub,
        bus.log
          ? `last ${pre.childElementCount} lines${bus.live ? (following ? ', following' : ', scroll down to follow') : ''}`
          : '',
      );
    };
    pre.addEventListener('scroll', () => {
      const at = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 24;
      if (at !== following) {
        following = at;
        follow();
      }
    });
    const all = () => {
      const lines = bus.log.split('\n');
      const part = lines.at(-1);
      if (!part) lines.pop();
      F.replace(pre, lines.slice(-400).map(line));
      shown = bus.log.length;
      if (!bus.log) pre.textContent = bus.live ? 'No line yet.' : 'The log is empty.';
      follow();
    };
    const more = () => {
      /* only what is new is added; a trim or an unfinished line means all anew */
      if (bus.log.length < shown || shown === 0 || bus.log[shown - 1] !== '\n') return all();
      const lines = bus.log.slice(shown).split('\n');
      if (!lines.at(-1)) lines.pop();
      pre.append(...lines.map(line));
      while (pre.childElementCount > 400) pre.firstElementChild.remove();
      shown = bus.log.length;
      follow();
    };
    bus.on('open', () => {
      following = true;
      all();
    });
    bus.on('tick', (b, d) => {
      if (d.log) more();
      else if (d.state) follow();
    });
    return {
      do(what, where) {
        if (what === 'copylog') F.copy(bus.log, 'Log copied');
        if (what === 'expand' && where === 'log') follow();
      },
    };
  });
})();
