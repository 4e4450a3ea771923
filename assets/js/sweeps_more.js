/* Parallel coordinates of parameters and objectives, and the importance of each parameter.

   const parallel = new fettle.SweepParallel(body); parallel.show(sweep)
   fettle.sweepImportance(body, sweep) */
(() => {
  'use strict';
  const F = window.fettle;
  const short = s => (String(s).length > 18 ? String(s).slice(0, 17) + '…' : String(s));

  F.SweepParallel = class {
    constructor(body) {
      this.plot = F.el('div', { class: 'ft-chart ft-tall sw-par', role: 'img' });
      this.say = F.el('p', { class: 'ft-none', hidden: true });
      F.replace(body, this.plot, this.say);
      this.size = 0;
      new ResizeObserver(() => {
        if (this.plot.clientWidth && Math.abs(this.plot.clientWidth - this.size) > 2) this.draw();
      }).observe(this.plot);
      F.onTheme(() => this.draw());
    }
    show(sweep) {
      const done = sweep.trials.filter(t => t.state === 'complete' && t.values && t.values.every(F.finite));
      this.say.hidden = done.length > 1;
      this.plot.hidden = done.length < 2;
      F.text(this.say, 'Lines appear here once two trials are complete.');
      const mark = JSON.stringify([sweep.id, done.map(t => [t.number, t.values])]);
      if (mark === this.mark) return;
      Object.assign(this, { mark, sweep, done });
      this.plot.setAttribute('aria-label', `Parallel coordinates of ${done.length} complete trials`);
      if (done.length > 1) this.draw();
    }
    dimensions() {
      const { sweep, done } = this,
        list = [];
      const categories = (label, values) => {
        const names = [...new Set(values)];
        list.push({
          label: short(label),
          values: values.map(v => names.indexOf(v)),
          tickvals: names.map((_, i) => i),
          ticktext: names.map(short),
          range: [-0.2, Math.max(names.length - 0.8, 0.2)],
        });
      };
      if (!sweep.parameters.length)
        categories(
          'pipeline',
          done.map(t => t.label),
        );
      for (const p of sweep.parameters) {
        const raw = done.map(t => t.params[p.path]);
        const numeric = raw.every(v => F.finite(v));
        if (!numeric) {
          categories(
            p.path,
            raw.map(v => (v === undefined ? 'not used' : typeof v === 'object' ? JSON.stringify(v) : String(v))),
          );
          continue;
        }
        if (p.choices) {
          const at = [...new Set(raw)].sort((a, b) => a - b);
          list.push({
            label: short(p.path),
            values: raw.map(v => at.indexOf(v)),
            tickvals: at.map((_, i) => i),
            ticktext: at.map(v => F.fig(v, Number.isInteger(v) ? 6 : 3).replace(/\.?0+$/, m => (m.includes('.') ? '' : m))),
            range: [-0.2, Math.max(at.length - 0.8, 0.2)],
          });
        } else if (p.log) {
          const low = Math.log10(p.low),
            high = Math.log10(p.high),
            ticks = Array.from({ length: 5 }, (_, i) => low + ((high - low) * i) / 4);
          list.push({
            label: short(p.path),
            values: raw.map(Math.log10),
            range: [low, high],
            tickvals: ticks,
            ticktext: ticks.map(v => F.fig(10 ** v, 2)),
          });
        } else list.push({ label: short(p.path), values: raw, range: [p.low, p.high] });
      }
      sweep.objectives.forEach((o, i) => {
        const k = o.name === 'memory' ? 1e9 : o.name === 'size' ? 1e6 : 1,
          unit = o.name === 'memory' ? 'GB' : o.name === 'size' ? 'MB' : o.unit,
          values = done.map(t => t.values[i] / k);
        const r = F.nice(Math.min(...values), Math.max(...values), 0.02);
        list.push({
          label: short(F.sweepWord(o.name) + (unit ? `, ${unit}` : '')),
          values,
          range: r,
          tickformat: o.name === 'trainable' ? '~s' : '.4~g',
        });
      });
      return list;
    }
    async draw() {
      const Plotly = await F.plotly();
      if (!this.done || this.done.length < 2 || !this.plot.clientWidth) return;
      this.size = this.plot.clientWidth;
      const t = F.token,
        o = this.sweep.objectives[0],
        first = this.done.map(d => d.values[0]),
        low = Math.min(...first),
        high = Math.max(...first),
        good = t('run-1'),
        poor = F.alpha(t('ink-3'), 1),
        scale =
          o.direction === 'minimize'
            ? [
                [0, good],
                [1, poor],
              ]
            : [
                [0, poor],
                [1, good],
              ];
      const all = this.dimensions(),
        room = Math.max(2, Math.floor(this.size / 92)),
        /* a narrow screen has room for a few axes: the objectives and the first parameters */
        kept =
          all.length <= room
            ? all
            : [...all.slice(0, Math.max(1, room - this.sweep.objectives.length)), ...all.slice(-this.sweep.objectives.length)];
      const font = { family: F.layout().font.family, size: 11, color: t('ink-2') };
      const trace = {
        type: 'parcoords',
        dimensions: kept,
        line: { color: first, cmin: low, cmax: high === low ? low + 1 : high, colorscale: scale, showscale: false },
        unselected: { line: { color: t('line-strong'), opacity: 0.25 } },
        labelfont: font,
        tickfont: { ...font, color: t('ink-3') },
        rangefont: { ...font, size: 1, color: 'rgba(0,0,0,0)' },
        uirevision: `${this.sweep.id}`,
      };
      Plotly.react(
        this.plot,
        [trace],
        {
          ...F.layout({ width: this.size, height: this.plot.clientHeight, margin: { l: 54, r: 44, t: 38, b: 14 } }),
          uirevision: `${this.sweep.id}`,
          paper_bgcolor: t('panel'),
        },
        F.CONFIG,
      );
    }
  };

  F.sweepImportance = (body, sweep) => {
    const mark = JSON.stringify([sweep.id, sweep.importance, sweep.counts.complete]);
    if (body.dataset.mark === mark) return;
    body.dataset.mark = mark;
    const rows = sweep.objectives
      .map((o, i) => [o, sweep.importance[i]])
      .filter(([, shares]) => shares && Object.keys(shares).length);
    if (!rows.length)
      return F.replace(
        body,
        F.el(
          'p',
          { class: 'ft-none' },
          sweep.parameters.length < 2
            ? 'Needs at least two varied fields.'
            : `Needs at least ${Math.max(6, sweep.parameters.length + 2)} complete trials; ${sweep.counts.complete || 0} so far.`,
        ),
      );
    F.replace(
      body,
      sweep.counts.complete < 20
        ? F.el('p', { class: 'sm mut' }, `From ${sweep.counts.complete} trials: a hint, not a finding.`)
        : null,
      rows.map(([o, shares]) =>
        F.el(
          'div',
          { class: 'sw-imp' },
          F.el('p', { class: 'ft-h' }, F.sweepWord(o.name)),
          Object.entries(shares)
            .sort((a, b) => b[1] - a[1])
            .map(([path, share]) =>
              F.el(
                'div',
                { class: 'sw-bar' },
                F.el('span', { class: 'name', title: path }, path),
                F.el('span', { class: 'track' }, F.el('i', { style: { width: `${100 * share}%` } })),
                F.el('span', { class: 'num' }, F.percent(share, 2)),
              ),
            ),
        ),
      ),
    );
  };
})();
