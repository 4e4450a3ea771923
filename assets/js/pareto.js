/* Cost against quality: intervals, the front, the limit, and a card for the run that is clicked.

   const pareto = new fettle.Pareto(body, tools, sub, {state, change, axes, noun});   // axes: {id: [name, unit]}, noun: ['run', 'runs']
   pareto.show(answer)   // answer of pareto(): {points: [{id, name, slot, text, x, y, low, high, front}], metric, limit, hidden} */
(() => {
  'use strict';
  const F = window.fettle,
    NB = F.NB;
  /* as workbench.compare names them: name, unit */
  const AXES = {
    size: ['Size', 'MB'],
    seconds: ['Time', ''],
    peak: ['Peak memory', 'GB'],
    trainable: ['Trainable', ''],
    speed: ['Training speed', '/s'],
    evaluation_speed: ['Evaluation speed', '/s'],
  };
  const MORE = ['speed', 'evaluation_speed'];

  F.Pareto = class {
    constructor(body, tools, sub, on) {
      Object.assign(this, { body, tools, sub, on, answer: null, spots: [], open: null });
      this.plot = F.el('div', { class: 'ft-chart ft-tall', tabindex: 0 });
      this.side = F.el('div', { class: 'ft-scroll ft-astable', hidden: true });
      this.say = F.el('p', { class: 'ft-none', hidden: true });
      this.card = F.el('div', { class: 'ft-pop ft-run-card', role: 'dialog', 'aria-label': 'Run', hidden: true });
      F.replace(body, F.el('div', { class: 'ft-hold' }, this.plot, this.card), this.side, this.say);
      this.pick = F.el(
        'select',
        { class: 'ft-in s ft-sel', 'aria-label': 'Horizontal axis' },
        Object.entries(this.axes).map(([k, a]) => F.el('option', { value: k }, a[0])),
      );
      this.pick.value = on.state.px;
      this.pick.addEventListener('change', () => {
        this.close();
        on.change({ px: this.pick.value });
      });
      this.button = F.el(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon',
          'aria-label': 'Show as table',
          title: 'Show as table',
          'aria-pressed': false,
          onclick: () => this.table(this.side.hidden),
        },
        F.icon('table'),
      );
      F.replace(tools, this.pick, this.button);
      /* while a button is down Plotly lays a cover over the page that takes pointerup; it gives the click back itself */
      let down = null;
      this.plot.addEventListener('pointerdown', e => (down = [e.clientX, e.clientY]), true);
      this.plot.addEventListener(
        'click',
        e => {
          if (down && Math.hypot(e.clientX - down[0], e.clientY - down[1]) < 5) this.hit(e);
          down = null;
        },
        true,
      );
      this.plot.addEventListener('keydown', e => this.key(e));
      this.card.addEventListener('keydown', e => {
        if (e.key === 'Escape') {
          this.close();
          this.plot.focus();
        }
      });
      document.addEventListener('pointerdown', e => {
        if (this.open !== null && !body.contains(e.target)) this.close();
      });
    }
    get axes() {
      return this.on.axes || AXES;
    }
    get spec() {
      return this.axes[this.on.state.px] || Object.values(this.axes)[0];
    }
    get nouns() {
      return this.on.noun || ['run', 'runs'];
    }
    /* what the zoom belongs to */
    get view() {
      return this.on.state.px;
    }
    /* too many points for the names of all that are on the front */
    get crowded() {
      return this.points.length > 30;
    }
    get more() {
      return MORE.includes(this.on.state.px);
    }
    show(answer) {
      const axis = this.on.state.px,
        view = this.view,
        fresh = !this.answer || this.seen !== view || this.answer.metric !== answer.metric;
      this.answer = answer;
      this.axis = axis;
      this.seen = view;
      this.points = answer.points.filter(p => F.finite(p.x) && F.finite(p.y));
      this.pick.value = axis;
      F.text(
        this.sub,
        `${this.spec[0].toLowerCase()}${this.spec[1] ? ', ' + this.spec[1] : ''}, against ${answer.metric || 'quality'}`,
      );
      const enough = this.points.length > 0;
      this.say.hidden = enough;
      if (!enough) F.text(this.say, `No ${this.nouns[0]} here has both ${this.spec[0].toLowerCase()} and quality yet.`);
      this.plot.parentNode.hidden = !enough || !this.side.hidden;
      if (!enough) return;
      const keys = JSON.stringify([this.points.map(p => [p.id, p.front, this.chosen(p)]), view]);
      if (!this.chart)
        this.chart = new F.Chart(this.plot, {
          id: this.on.id || 'pareto',
          aria: 'Pareto front',
          clock: false,
          traces: () => this.traces(),
          layout: () => this.layout(),
          auto: () => this.range(),
          overlay: d => this.over(d),
        });
      if (fresh) {
        this.chart.ranges = {};
        this.chart.axis = this.chart.axis || view;
      }
      this.fill();
      this.plot.setAttribute(
        'aria-label',
        `${this.spec[0]} against ${answer.metric} of ${this.points.length} ${this.nouns[1]}; on the front: ${this.points
          .filter(p => p.front)
          .map(p => p.name)
          .join(', ')}. Arrow keys go from ${this.nouns[0]} to ${this.nouns[0]}, Enter opens one.`,
      );
      if (keys !== this.keys) {
        this.keys = keys;
        this.chart.rebuild({ axis: view });
      } else this.chart.flush();
      if (this.open !== null) this.points.some(p => p.id === this.open) ? this.chart.paint() : this.close();
      if (!this.side.hidden) this.table(true);
    }
    chosen(p) {
      return this.on.state.runs.includes(p.id);
    }
    /* of many runs only the chosen and those on the front keep their colour */
    css(p) {
      return this.points.length > 10 && !this.chosen(p) && !p.front ? F.token('ink-3') : F.run(p.slot).color;
    }
    fill() {
      for (const p of this.points)
        this.chart.put(`p${p.id}`, [p.x], [p.y], {
          'error_y.array': [F.finite(p.high) ? p.high - p.y : 0],
          'error_y.arrayminus': [F.finite(p.low) ? p.y - p.low : 0],
        });
      const [sx, sy] = this.stairs();
      this.chart.put('front', sx, sy, {});
    }
    stairs() {
      const front = this.points.filter(p => p.front).sort((a, b) => a.x - b.x),
        r = this.reach();
      if (!front.length) return [[], []];
      const x = [],
        y = [],
        low = F.lowerIsBetter(this.answer.metric),
        worst = low ? r.y[1] + (r.y[1] - r.y[0]) : r.y[0] - (r.y[1] - r.y[0]);
      if (!this.more) {
        x.push(front[0].x);
        y.push(worst);
        front.forEach((p, i) => {
          if (i) {
            x.push(p.x);
            y.push(front[i - 1].y);
          }
          x.push(p.x);
          y.push(p.y);
        });
        x.push(r.x[1] + (r.x[1] - r.x[0]));
        y.push(front[front.length - 1].y);
      } else {
        x.push(r.x[0] - (r.x[1] - r.x[0]));
        y.push(front[0].y);
        front.forEach((p, i) => {
          if (i) {
            x.push(front[i - 1].x);
            y.push(p.y);
          }
          x.push(p.x);
          y.push(p.y);
        });
        x.push(front[front.length - 1].x);
        y.push(worst);
      }
      return [x, y];
    }
    traces() {
      return [
        { key: 'front', mode: 'lines', line: { color: F.token('ink-2'), width: 1.25 }, hoverinfo: 'skip' },
        ...this.points.map(p => {
          const color = this.css(p),
            symbol = F.run(p.slot).symbol;
          return {
            key: `p${p.id}`,
            name: p.name,
            mode: 'markers',
            marker: { color, symbol: p.front ? symbol : symbol + '-open', size: p.front ? 10 : 8, line: { color, width: 1.5 } },
            error_y: { type: 'data', symmetric: false, color: F.alpha(color, 0.6), thickness: 1.25, width: 0 },
            hovertemplate: `<b>${p.name.replace(/[<>&]/g, '')}</b><br>%{y:.4~g} ${this.answer.metric || ''}<br>${this.figure(p.x)}<extra></extra>`,
          };
        }),
      ];
    }
    figure(x) {
      return ['seconds', 'trainable'].includes(this.axis) ? this.plain(x) : F.unit(x, this.spec[1]);
    }
    /* without its unit, which the table's head has */
    plain(x) {
      return this.axis === 'seconds' ? F.clock(x) : this.axis === 'trainable' ? F.count(x) : F.fig(x);
    }
    layout() {
      return {
        margin: { l: 46, r: 14, t: 18, b: 26 },
        hovermode: 'closest',
        xaxis: {
          showgrid: true,
          gridcolor: F.token('grid'),
          tickformat: this.axis === 'trainable' ? '~s' : '~g',
          ticksuffix: '',
        },
        yaxis: { tickformat: '~g' },
      };
    }
    /* the bulk of the runs; what lies far outside is said, not drawn */
    reach() {
      const ys = this.points.map(p => p.y),
        q1 = F.quantile(ys, 0.25),
        q3 = F.quantile(ys, 0.75),
        spread = Math.max(q3 - q1, Math.abs(q1) * 0.01),
        low = F.lowerIsBetter(this.answer.metric);
      const near = this.points.filter(p => p.front || this.chosen(p) || (low ? p.y <= q3 + 3 * spread : p.y >= q1 - 3 * spread)),
        kept = near.length ? near : this.points;
      this.out = this.points.length - kept.length;
      const y = F.nice(
        Math.min(...kept.map(p => (F.finite(p.low) ? p.low : p.y))),
        Math.max(...kept.map(p => (F.finite(p.high) ? p.high : p.y))),
        0.08,
      );
      const xs = kept.map(p => p.x),
        limit = this.limit();
      if (F.finite(limit) && limit < Math.max(...xs) * 3) xs.push(limit);
      const x = F.nice(Math.min(...xs), Math.max(...xs), 0.1);
      if (x[0] < 0) x[0] = 0;
      this.edge = low ? y[1] : y[0];
      return { x, y };
    }
    limit() {
      return F.finite(this.answer.limit) ? this.answer.limit : null;
    }
    range() {
      return this.points && this.points.length ? this.reach() : {};
    }
    over(d) {
      const limit = this.limit();
      if (F.finite(limit) && !this.more) d.limitX(limit, `${this.spec[0].toLowerCase()} limit ${this.figure(limit)}`);
      const equal = this.on.state.equal;
      if (equal && equal.axis === this.axis) F.equalLine(d, equal);
      this.spots = this.points.map(p => ({ p, x: d.X(p.x), y: d.Y(p.y) })).filter(s => d.inX(s.x) && d.inY(s.y));
      this.names(d);
      if (this.out)
        d.text(
          d.box.r - 4,
          F.lowerIsBetter(this.answer.metric) ? d.box.t + 10 : d.box.b - 7,
          `${this.out} ${this.nouns[this.out === 1 ? 0 : 1]} ${F.lowerIsBetter(this.answer.metric) ? 'above' : 'below'} ${F.fig(this.edge)}`,
          '',
          'end',
        );
      const at = this.open !== null && this.spots.find(s => s.p.id === this.open);
      if (at) {
        d.add('circle', { cx: at.x, cy: at.y, r: 9, class: 'ring' });
        this.place(at, d.box);
      }
    }
    /* the front by name, as far as the names keep apart */
    names(d) {
      const taken = [];
      for (const s of this.spots.filter(s => s.p.front)) {
        const wide = s.p.name.length * 6.1,
          left = s.x + 10 + wide > d.box.r,
          box = { x: left ? s.x - 10 - wide : s.x + 10, y: s.y - 8, w: wide, h: 12 };
        if (this.crowded && !this.chosen(s.p)) continue;
        if (taken.some(t => Math.abs(t.y - box.y) < 12 && t.x < box.x + box.w && box.x < t.x + t.w)) continue;
        taken.push(box);
        d.text(left ? s.x - 10 : s.x + 10, s.y - 6, s.p.name, 'ink', left ? 'end' : 'start');
      }
    }
    nearest(x, y) {
      let best = null;
      for (const s of this.spots) {
        const far = Math.hypot(s.x - x, s.y - y);
        if (far < 16 && (!best || far < best.far)) best = { far, s };
      }
      return best && best.s.p;
    }
    hit(e) {
      const r = this.plot.getBoundingClientRect(),
        p = this.nearest(e.clientX - r.left, e.clientY - r.top);
      p ? this.show_card(p) : this.close();
    }
    key(e) {
      const order = [...this.spots].sort((a, b) => a.x - b.x || a.y - b.y).map(s => s.p);
      if (!order.length || e.target !== this.plot) return;
      const i = order.findIndex(p => p.id === this.open);
      if (e.key === 'ArrowRight' || e.key === 'ArrowDown') this.show_card(order[(i + 1) % order.length]);
      else if (e.key === 'ArrowLeft' || e.key === 'ArrowUp') this.show_card(order[(i - 1 + order.length) % order.length]);
      else if (e.key === 'Enter' && i >= 0) this.enter(order[i]);
      else if (e.key === 'Escape') this.close();
      else return;
      e.preventDefault();
    }
    enter() {
      this.card.querySelector('a, button')?.focus();
    }
    show_card(p) {
      this.open = p.id;
      F.replace(
        this.card,
        F.el(
          'p',
          { class: 'row', style: 'gap:6px' },
          F.runMark(p.slot),
          F.el('b', {}, p.name),
          F.el(
            'button',
            {
              type: 'button',
              class: 'ft-btn icon',
              style: 'margin-left:auto',
              'aria-label': 'Close',
              onclick: () => {
                this.close();
                this.plot.focus();
              },
            },
            F.icon('cross', 's'),
          ),
        ),
        F.el('p', { class: 'mut' }, p.text),
        F.el('p', { class: 'num' }, `${this.figure(p.x)}, ${F.interval(p.y, p.low, p.high, this.answer.metric)}`),
        F.el(
          'p',
          { class: 'row wrap', style: 'margin-top:6px;gap:6px' },
          F.el('a', { class: 'ft-btn', href: `/?clone=${p.id}` }, F.icon('copy'), 'Clone settings'),
          F.el(
            'button',
            {
              type: 'button',
              class: 'ft-btn',
              onclick: () => {
                this.on.choose(p.id);
                this.show_card(p);
              },
            },
            this.chosen(p) ? 'Leave out' : 'Choose',
          ),
          F.el('a', { class: 'ft-btn quiet', href: `/live?run=${p.id}` }, 'Open'),
        ),
      );
      this.card.hidden = false;
      this.chart.paint();
    }
    place(at, box) {
      const w = this.card.offsetWidth || 230,
        h = this.card.offsetHeight || 120;
      let x = at.x + 18,
        y = Math.max(4, Math.min(box.b - h - 4, at.y - h - 12));
      if (x + w > box.r) x = at.x - w - 18;
      if (x < 2) {
        x = Math.max(2, Math.min(box.r - w, at.x - w / 2));
        y = at.y + 16 + h < box.b ? at.y + 16 : Math.max(2, at.y - h - 16);
      }
      this.card.style.left = `${x}px`;
      this.card.style.top = `${y}px`;
    }
    close() {
      if (this.open === null) return;
      this.open = null;
      this.card.hidden = true;
      if (this.chart) this.chart.paint();
    }
    table(on) {
      this.side.hidden = !on;
      this.button.setAttribute('aria-pressed', on);
      this.plot.parentNode.hidden = on || !this.say.hidden;
      if (on && this.points)
        F.replace(
          this.side,
          F.table(
            [
              { name: this.nouns[0][0].toUpperCase() + this.nouns[0].slice(1) },
              {
                name: this.spec[0],
                unit: this.spec[1] || null,
                r: true,
                f: v => this.plain(v),
              },
              { name: 'Quality', unit: this.answer.metric, r: true, f: v => F.fig(v, 4) },
              { name: 'from', r: true, f: v => F.fig(v, 4) },
              { name: 'to', r: true, f: v => F.fig(v, 4) },
              { name: 'On the front' },
            ],
            [...this.points].sort((a, b) => a.x - b.x).map(p => [p.name, p.x, p.y, p.low, p.high, p.front ? 'yes' : '']),
          ),
        );
    }
  };
})();
