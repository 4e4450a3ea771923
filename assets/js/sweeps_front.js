/* The trials of a sweep on two axes, and the best so far. Axes are objectives and numeric parameters; the front is the server's.

   const front = new fettle.SweepFront(body, tools, sub, {get: () => ({x, y}), set: ({x, y}) => ...});
   front.show(sweep)                        // answer of status() */
(() => {
  'use strict';
  const F = window.fettle,
    NB = F.NB;
  const LIMITS = {
    memory: ['memory_gb', 1e9],
    size: ['size_mb', 1e6],
    trainable: ['trainable', 1],
    seconds: ['minutes', 60],
    joules: ['joules', 1],
  };
  const WORDS = {
    quality: 'Quality',
    seconds: 'Time',
    memory: 'Peak memory',
    size: 'Size',
    trainable: 'Trainable',
    joules: 'Energy',
  };
  const SCALE = { memory: [1e9, 'GB'], size: [1e6, 'MB'] };
  const tidy = s => String(s).replace(/[<>&]/g, '');

  /* figures of an objective as people read them */
  F.sweepFigure = (objective, v) =>
    !F.finite(v)
      ? F.MISSING
      : objective.name === 'memory'
        ? F.gb(v)
        : objective.name === 'size'
          ? F.unit(v / 1e6, 'MB')
          : objective.name === 'trainable'
            ? F.count(v)
            : objective.name === 'seconds'
              ? F.clock1(v)
              : F.fig(v, 4) + (objective.unit ? NB + objective.unit : '');
  F.sweepWord = name => WORDS[name] || name;
  /* the axes that a sweep offers */
  F.sweepAxes = sweep => [
    ...sweep.objectives.map((o, i) => {
      const [k, u] = SCALE[o.name] || [1, o.unit];
      return {
        id: o.name,
        name: F.sweepWord(o.name),
        unit: u,
        objective: o,
        of: t => (t.values ? (F.finite(t.values[i]) ? t.values[i] / k : null) : null),
        per: k,
      };
    }),
    ...sweep.parameters
      .filter(p => !p.choices || p.choices.every(c => c !== '' && Number.isFinite(Number(c))))
      .map(p => ({
        id: p.path,
        name: p.path,
        unit: '',
        log: p.log,
        of: t => (p.path in t.params ? Number(t.params[p.path]) : null),
        per: 1,
      })),
    { id: 'trial', name: 'Trial', unit: '', of: t => t.number + 1, per: 1 },
  ];

  F.SweepFront = class {
    constructor(body, tools, sub, on) {
      Object.assign(this, { body, tools, sub, on });
      this.plot = F.el('div', { class: 'ft-chart ft-tall', tabindex: 0 });
      this.say = F.el('p', { class: 'ft-none', hidden: true });
      F.replace(body, this.plot, this.say);
      this.picks = ['x', 'y'].map(k => {
        const pick = F.el('select', { class: 'ft-in s ft-sel', 'aria-label': k === 'x' ? 'Horizontal axis' : 'Vertical axis' });
        pick.addEventListener('change', () => {
          this.on.set({ [k]: pick.value });
          this.show(this.sweep);
        });
        return pick;
      });
      F.replace(tools, this.picks[0], F.el('span', { class: 'dim sm' }, 'against'), this.picks[1]);
    }
    axes() {
      const all = F.sweepAxes(this.sweep),
        asked = this.on.get(),
        by = id => all.find(a => a.id === id);
      const y = by(asked.y) || all[0],
        x = by(asked.x) || (this.sweep.objectives.length > 1 ? all[1] : all.find(a => a.id !== y.id));
      return [x, y, all];
    }
    show(sweep) {
      this.sweep = sweep;
      const [x, y, all] = this.axes();
      for (const [i, chosen] of [x, y].entries()) {
        const keys = all.map(a => a.id).join();
        if (this.picks[i].dataset.keys !== keys) {
          F.replace(
            this.picks[i],
            all.map(a => F.el('option', { value: a.id }, a.name)),
          );
          this.picks[i].dataset.keys = keys;
        }
        this.picks[i].value = chosen.id;
      }
      this.x = x;
      this.y = y;
      this.points = sweep.trials
        .filter(t => ['complete', 'pruned'].includes(t.state))
        .map(t => ({ t, x: x.of(t), y: y.of(t) }))
        .filter(p => F.finite(p.x) && F.finite(p.y) && (!x.log || p.x > 0));
      const complete = this.points.filter(p => p.t.state === 'complete');
      const named = a => a.name.toLowerCase() + (a.unit ? `, ${a.unit}` : '');
      F.text(
        this.sub,
        `${named(x)} against ${named(y)}` +
          (sweep.objectives.length > 1 ? '; filled: no trial is better in every objective' : ''),
      );
      this.say.hidden = this.points.length > 0;
      this.plot.hidden = !this.points.length;
      if (!this.points.length) return F.text(this.say, 'No trial has ended yet. Points appear here as trials end.');
      const axis = `${sweep.id}.${x.id}.${y.id}`;
      if (!this.chart)
        this.chart = new F.Chart(this.plot, {
          id: 'sweep-front',
          aria: 'Trials of the sweep',
          clock: false,
          traces: () => this.traces(),
          layout: () => this.layout(),
          auto: () => this.reach(),
          overlay: d => this.over(d),
        });
      const front = new Set(sweep.front);
      const groups = {
        front: complete.filter(p => front.has(p.t.number)),
        other: complete.filter(p => !front.has(p.t.number)),
        pruned: this.points.filter(p => p.t.state === 'pruned'),
      };
      for (const [key, list] of Object.entries(groups))
        this.chart.put(
          key,
          list.map(p => this.put(p.x)),
          list.map(p => p.y),
          { text: list.map(p => this.text(p.t)), customdata: list.map(p => p.t.run) },
        );
      const line = this.twoWays() ? [...groups.front].sort((a, b) => a.x - b.x) : [];
      this.chart.put(
        'line',
        line.map(p => this.put(p.x)),
        line.map(p => p.y),
        {},
      );
      this.plot.setAttribute(
        'aria-label',
        `${this.points.length} trials, ${x.name} against ${y.name}; on the front: ` +
          (groups.front.map(p => `trial ${p.t.number + 1}`).join(', ') || 'none'),
      );
      if (axis !== this.axis) {
        this.axis = axis;
        this.chart.ranges = {};
        this.chart.rebuild({ axis });
      } else this.chart.flush();
    }
    put(v) {
      return this.x.log ? Math.log10(v) : v;
    }
    twoWays() {
      return this.x.objective && this.y.objective && this.sweep.objectives.length === 2;
    }
    text(t) {
      const params = t.label
        ? [tidy(t.label)]
        : Object.entries(t.params).map(([k, v]) => `${tidy(k)} = ${tidy(typeof v === 'object' ? JSON.stringify(v) : v)}`);
      return [
        `<b>Trial ${t.number + 1}</b>${t.state === 'pruned' ? ', pruned' : ''}`,
        ...params.slice(0, 8),
        ...this.sweep.objectives.map((o, i) => `${F.sweepWord(o.name)}: ${F.sweepFigure(o, t.values[i])}`),
      ].join('<br>');
    }
    traces() {
      const muted = F.token('ink-3'),
        strong = F.token('run-1'),
        hovertemplate = '%{text}<extra></extra>';
      return [
        { key: 'line', mode: 'lines', line: { color: F.token('ink-2'), width: 1.25, shape: 'linear' }, hoverinfo: 'skip' },
        {
          key: 'pruned',
          name: 'pruned',
          mode: 'markers',
          marker: { color: muted, symbol: 'x-thin-open', size: 7, opacity: 0.7, line: { color: muted, width: 1.25 } },
          hovertemplate,
        },
        {
          key: 'other',
          name: 'complete',
          mode: 'markers',
          marker: { color: F.alpha(muted, 0.25), size: 8, line: { color: muted, width: 1.25 } },
          hovertemplate,
        },
        {
          key: 'front',
          name: 'front',
          mode: 'markers',
          marker: { color: strong, size: 10, line: { color: F.token('panel'), width: 1 } },
          hovertemplate,
        },
      ];
    }
    layout() {
      return {
        margin: { l: 52, r: 14, t: 18, b: 28 },
        hovermode: 'closest',
        xaxis: {
          showgrid: true,
          gridcolor: F.token('grid'),
          ...(this.x.log ? this.decades() : { tickformat: this.x.id === 'trainable' ? '~s' : '~g', tickmode: 'auto' }),
        },
        yaxis: { tickformat: this.y.id === 'trainable' ? '~s' : '~g' },
      };
    }
    /* the axis holds logarithms, so that ranges and zoom are those of every other chart */
    decades() {
      const vals = [];
      for (let e = -9; e <= 9; e++) for (const k of [1, 2, 5]) vals.push(k * 10 ** e);
      return {
        tickmode: 'array',
        tickvals: vals.map(Math.log10),
        ticktext: vals.map(v => (String(v)[0] === '1' || /^1/.test(v.toExponential()) ? F.fig(v, 1) : '')),
      };
    }
    limit(a) {
      const row = a.objective && LIMITS[a.objective.name],
        v = row && this.sweep.budget[row[0]];
      return F.finite(v) && !(a.id === 'trainable' && v <= 1) ? (v * row[1]) / a.per : null;
    }
    reach() {
      if (!this.points?.length) return {};
      const xs = this.points.map(p => this.put(p.x)),
        ys = this.points.filter(p => p.t.state === 'complete').map(p => p.y),
        all = ys.length ? ys : this.points.map(p => p.y);
      const lx = this.limit(this.x);
      if (F.finite(lx) && lx < Math.max(...xs) * 2) xs.push(lx);
      const x = F.nice(Math.min(...xs), Math.max(...xs), 0.08);
      if (x[0] < 0 && !this.x.log) x[0] = 0;
      return { x, y: F.nice(Math.min(...all), Math.max(...all), 0.1) };
    }
    over(d) {
      const lx = this.limit(this.x),
        ly = this.limit(this.y);
      const label = (a, v) => `${a.name.toLowerCase()} limit ${F.sweepFigure(a.objective, v * a.per)}`;
      if (F.finite(lx)) d.limitX(lx, label(this.x, lx));
      if (F.finite(ly)) d.limitY(ly, label(this.y, ly));
      const front = new Set(this.sweep.front),
        taken = [];
      for (const p of this.points.filter(p => front.has(p.t.number))) {
        const x = d.X(this.put(p.x)),
          y = d.Y(p.y);
        if (!d.inX(x) || !d.inY(y) || taken.some(t => Math.abs(t[0] - x) < 26 && Math.abs(t[1] - y) < 13)) continue;
        taken.push([x, y]);
        d.text(x + 9 > d.box.r - 20 ? x - 9 : x + 9, y - 7, `${p.t.number + 1}`, 'ink', x + 9 > d.box.r - 20 ? 'end' : 'start');
      }
    }
  };

  /* the best value of the first objective after each trial that ended */
  F.SweepBest = class {
    constructor(body, sub) {
      this.sub = sub;
      this.plot = F.el('div', { class: 'ft-chart ft-tall' });
      this.say = F.el('p', { class: 'ft-none', hidden: true });
      F.replace(body, this.plot, this.say);
    }
    show(sweep) {
      this.sweep = sweep;
      const o = sweep.objectives[0],
        [k, unit] = SCALE[o.name] || [1, o.unit],
        done = sweep.trials
          .filter(t => t.state === 'complete' && t.values && F.finite(t.values[0]))
          .sort((a, b) => a.ended - b.ended);
      F.text(
        this.sub,
        `${F.sweepWord(o.name).toLowerCase()}${unit ? ', ' + unit : ''}, ` +
          `${o.direction === 'minimize' ? 'lower' : 'higher'} is better; by complete trial`,
      );
      this.say.hidden = done.length > 0;
      this.plot.hidden = !done.length;
      if (!done.length) return F.text(this.say, 'The first complete trial begins this curve.');
      const sign = o.direction === 'minimize' ? 1 : -1;
      let best = Infinity;
      const line = done.map(t => (best = Math.min(best, sign * t.values[0])) && (sign * best) / k);
      this.values = done.map(t => t.values[0] / k);
      this.line = line;
      if (!this.chart)
        this.chart = new F.Chart(this.plot, {
          id: 'sweep-best',
          aria: 'Best so far',
          clock: false,
          traces: () => [
            {
              key: 'all',
              mode: 'markers',
              marker: { size: 6, color: F.alpha(F.token('ink-3'), 0.25), line: { color: F.token('ink-3'), width: 1 } },
              hovertemplate: '%{text}<extra></extra>',
            },
            { key: 'best', mode: 'lines', line: { color: F.token('run-1'), width: 2, shape: 'hv' }, hoverinfo: 'skip' },
          ],
          layout: () => ({
            margin: { l: 52, r: 60, t: 18, b: 28 },
            hovermode: 'closest',
            xaxis: { tickformat: 'd' },
            yaxis: { tickformat: '~g' },
          }),
          auto: () => (this.values ? { x: [0.5, Math.max(this.values.length, 4) + 0.5], y: this.range() } : {}),
          overlay: d =>
            d.ends([{ x: this.line.length, y: this.line.at(-1), t: F.fig(this.line.at(-1), 4), c: F.token('run-1') }]),
        });
      const n = done.map((_, i) => i + 1);
      this.chart.put('all', n, this.values, { text: done.map(t => `Trial ${t.number + 1}: ${F.sweepFigure(o, t.values[0])}`) });
      this.chart.put('best', line.length === 1 ? [1, 1.5] : n, line.length === 1 ? [line[0], line[0]] : line, {});
      this.chart.axis = `${sweep.id}`;
      this.plot.setAttribute(
        'aria-label',
        `Best ${F.sweepWord(o.name).toLowerCase()} after ${done.length} complete trials: ` +
          F.sweepFigure(o, sweep.best.at(-1)?.value),
      );
      this.chart.flush();
    }
    range() {
      const q1 = F.quantile(this.values, 0.25),
        q3 = F.quantile(this.values, 0.75),
        spread = Math.max(q3 - q1, Math.abs(q1) * 0.02);
      const kept = this.values.filter(v => v >= q1 - 3 * spread && v <= q3 + 3 * spread);
      return F.nice(Math.min(...kept, ...this.line.slice(-1)), Math.max(...kept, this.line.at(-1)), 0.1);
    }
  };
})();
