/* Quality against cost of the leaderboard's rows: Compare's Pareto plot with methods in place of runs. A click chooses a row. */
(() => {
  'use strict';
  const F = window.fettle;
  const AXES = {
    pace: ['Time a step', '× LoRA'],
    peak: ['Peak memory', 'MB'],
    trainable: ['Trained parameters', ''],
  };

  F.MethodFront = class extends F.Pareto {
    static costs = Object.keys(AXES);
    constructor(body, tools, sub, on) {
      super(body, tools, sub, { ...on, axes: AXES, noun: ['method', 'methods'], id: 'leaderboard' });
    }
    /* rows: what the search left, all: the whole arena, whose front it is */
    show(arena, rows, state) {
      const { at, px } = state,
        without = rows.filter(r => r[at] && !F.finite(r[px])).length;
      this.without = without ? `${without} without this cost` : '';
      this.arena = arena;
      this.at = at;
      const points = rows
        .filter(r => r[at] && F.finite(r[px]))
        .map(r => ({
          id: r.id,
          row: r,
          name: [r.short, r.form].filter(Boolean).join(' '),
          x: px === 'trainable' ? Math.log10(r[px]) : px === 'peak' ? r[px] / 1e6 : r[px],
          y: r[at].value,
          low: r[at].low,
          high: r[at].high,
          front: r.front[at][px],
        }));
      super.show({ points, metric: arena.metric });
      F.text(this.sub, arena.metric);
    }
    get view() {
      return [this.arena?.id, this.at, this.on.state.px].join('.');
    }
    get crowded() {
      return false;
    }
    chosen(p) {
      return p.id === this.open;
    }
    css(p) {
      return F.token(p.front ? 'ink' : 'ink-3');
    }
    figure(x) {
      return this.axis === 'peak' ? `${this.plain(x)}${F.NB}MB` : this.axis === 'pace' ? `${this.plain(x)} × LoRA` : `${this.plain(x)} trained`;
    }
    plain(x) {
      return this.axis === 'trainable' ? F.count(10 ** x) : F.fig(x);
    }
    layout() {
      const own = super.layout();
      if (this.axis === 'trainable') {
        const { tickvals, ticktext, tickmode } = F.SweepFront.prototype.decades(),
          short = v => F.countParts(10 ** Math.round(v)).map((t, i) => (i ? t : +t)).join('');
        Object.assign(own.xaxis, { tickmode, tickvals, ticktext: tickvals.map((v, i) => (ticktext[i] ? short(v) : '')) });
      }
      return own;
    }
    /* the chosen row, the front and LoRA by name, each where it covers least; all but the chosen give way to other names */
    names(d) {
      if (this.without) d.text(d.box.r - 4, this.arena.lower ? d.box.b - 7 : d.box.t + 10, this.without, '', 'end');
      const first = s => (s.p.id === this.open ? 0 : s.p.front ? 1 : 2),
        taken = [],
        over = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
      for (const s of this.spots.filter(s => s.p.front || s.p.id === this.open || s.p.id === 'lora').sort((a, b) => first(a) - first(b))) {
        const w = s.p.name.length * 6.1,
          places = [
            [10, -6],
            [12, 4],
            [10, 14],
            [-10 - w, -6],
            [-12 - w, 4],
            [-10 - w, 14],
            [-w / 2, -14],
            [-w / 2, 22],
          ].map(([dx, dy], i) => {
            const box = { x: s.x + dx, y: s.y + dy - 10, w, h: 12 },
              out = box.x < d.box.l || box.x + w > d.box.r || box.y < d.box.t || box.y + 12 > d.box.b,
              names = taken.filter(t => over(t, box)).length,
              points = this.spots.filter(o => o !== s && over({ x: o.x - 5, y: o.y - 5, w: 10, h: 10 }, box)).length;
            return { box, names, cost: out * 100 + names * 20 + points * 2 + i * 0.1 };
          }),
          best = places.sort((a, b) => a.cost - b.cost)[0];
        if (s.p.id !== this.open && (best.names || (!s.p.front && best.cost >= 2))) continue;
        taken.push(best.box);
        d.text(best.box.x, best.box.y + 10, s.p.name, ['ink b', 'ink', 'ink2'][first(s)]);
      }
    }
    /* the row is the card: nothing pops up, and what is chosen stays so */
    show_card(p) {
      this.on.choose(p.id);
    }
    enter(p) {
      this.on.enter(p.id);
    }
    place() {}
    close() {}
    ring(id) {
      this.open = id;
      this.chart?.paint();
    }
  };
})();
