/* Below the columns of the Try page: preference, speed, memory, kept comparisons.

   const side = new fettle.TrySide($, cards, ask);   // ask: all kept comparisons, for the export
   side.measured(shown, busy); side.votes(found); */
(() => {
  'use strict';
  const F = window.fettle;
  const { PATHS, look, marker } = F.variant;
  const SHOWN = 8;
  const DASH = { solid: null, '6px,2px': '6 2', '2px,2px': '2 2', '8px,2px,2px,2px': '8 2 2 2', '4px,3px': '4 3' };
  const PREFERENCE = [
    { name: 'Variant' },
    { name: 'Votes won', r: true },
    { name: 'Votes', r: true },
    { name: 'Share', r: true, unit: '%' },
    { name: 'From', r: true, unit: '%' },
    { name: 'To', r: true, unit: '%' },
  ];
  const KEPT = ['When', 'Prompt', 'Variants', 'Vote', 'Blind', 'Seed', 'Temperature', 'Top p', 'New tokens', 'Texts'].map(
    name => ({ name }),
  );
  const none = (words, style) => F.el('p', { class: 'ft-none', style }, words);
  const percent = x => (100 * x).toFixed(0);
  const when = t => {
    const d = new Date(t * 1000),
      two = n => String(n).padStart(2, '0'),
      day = `${two(d.getHours())}:${two(d.getMinutes())}`;
    return d.toDateString() === new Date().toDateString()
      ? day
      : `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${day}`;
  };
  const agrees = row => {
    const h = (row.extra || {}).held_out;
    return !h ? '\u2013' : h.agrees ? 'yes' : `no, by ${F.fig(h.by)}${F.NB}${h.metric}`;
  };
  const tall = x => {
    const p = 10 ** Math.floor(Math.log10(x));
    return [1, 2, 2.5, 5, 10].find(m => m * p >= x) * p;
  };

  F.TrySide = class {
    constructor($, cards, ask) {
      Object.assign(this, { $, cards, ask, tables: {}, more: false, found: null });
      let width = 0;
      new ResizeObserver(() => {
        const w = $('[data-speed]').clientWidth;
        if (Math.abs(w - width) < 3) return;
        width = w;
        if (this.shown) this.measured(true, this.busy);
      }).observe($('[data-speed]'));
    }
    toggle(key, paint) {
      const flip = () => {
        this.tables[key] = !this.tables[key];
        paint();
      };
      return F.el(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon',
          'aria-label': 'Show as table',
          title: 'Show as table',
          'aria-pressed': !!this.tables[key],
          onclick: flip,
        },
        F.icon('table'),
      );
    }

    /* ---------- votes ---------- */
    votes(found) {
      this.found = found;
      this.preference(found.preference);
      this.kept(found);
    }
    preference(list) {
      const $ = this.$,
        rows = list.map(e => [e.name, e.wins, e.n, percent(e.share), percent(e.low), percent(e.high)]);
      F.text($('[data-pref-sub]'), list.length ? 'share of blind votes won, 95 % interval' : '');
      const save = F.el(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon',
          'aria-label': 'Download CSV',
          title: 'Download CSV',
          onclick: () => F.csv('preference.csv', PREFERENCE, rows),
        },
        F.icon('down'),
      );
      F.replace($('[data-pref-tools]'), list.length ? [this.toggle('preference', () => this.preference(list)), save] : []);
      if (!list.length)
        F.replace(
          $('[data-pref]'),
          none('No blind vote yet. Generate with two variants or more, then choose the best before their names are shown.'),
        );
      else if (this.tables.preference) F.replace($('[data-pref]'), F.table(PREFERENCE, rows));
      else
        F.replace(
          $('[data-pref]'),
          F.el(
            'div',
            { class: 'ft-pref' },
            list.slice(0, SHOWN).map(e => this.line(e)),
            F.el('span'),
            F.el(
              'span',
              { class: 'axis num' },
              ['0', '25', '50', '75', `100${F.NB}%`].map(t => F.el('span', {}, t)),
            ),
            F.el('span'),
          ),
        );
    }
    line(e) {
      const style = `--c:${look(e).css};--lo:${e.low};--hi:${e.high};--v:${e.share}`;
      const aria = `${percent(e.share)} %, from ${percent(e.low)} to ${percent(e.high)} %`;
      return [
        F.el('span', { class: 'who', title: e.text }, marker(e), F.el('span', {}, e.name)),
        F.el('span', { class: 'scale', style, role: 'img', 'aria-label': aria }, F.el('i', { class: 'iv' }), marker(e)),
        F.el('span', { class: 'num mut r' }, `${e.wins} of ${e.n}`),
      ];
    }
    kept(found) {
      const $ = this.$,
        n = found.total;
      F.text($('[data-kept-sub]'), n ? `${n.toLocaleString('en-US')}, all with text, settings and vote` : '');
      F.replace(
        $('[data-kept-tools]'),
        n
          ? F.el(
              'button',
              { type: 'button', class: 'ft-btn quiet', style: 'height:26px', onclick: () => this.save() },
              F.icon('down'),
              'Export',
            )
          : [],
      );
      if (!n)
        return F.replace(
          $('[data-kept]'),
          none('Nothing kept yet. Each vote keeps the prompt, the settings and all texts.', 'padding:10px 12px'),
        );
      const title = 'Whether the variant with the best held-out figure won';
      const head = [
        ...['When', 'Prompt', 'Variants', 'Vote'].map(t => F.el('th', { scope: 'col' }, t)),
        F.el('th', { scope: 'col', class: 'r', title }, 'Held-out figure agrees'),
        F.el('th', { scope: 'col', class: 'r' }, 'Seed'),
      ];
      const rows = (this.more ? found.rows : found.rows.slice(0, SHOWN)).map(r =>
        F.el(
          'tr',
          {},
          F.el('td', { class: 'dim num' }, when(r.created)),
          F.el('td', { class: 'mono p', title: r.prompt }, r.prompt),
          F.el('td', { class: 'mut vs' }, r.variants.map(v => v.name).join(', ')),
          F.el('td', { class: 'b' }, r.winner === null ? 'tie' : r.winner),
          F.el('td', { class: 'r mut' }, agrees(r)),
          F.el('td', { class: 'r num' }, String(r.seed)),
        ),
      );
      const more = () => {
        this.more = true;
        this.kept(found);
      };
      F.replace(
        $('[data-kept]'),
        F.el('table', { class: 'ft-table kept' }, F.el('thead', {}, F.el('tr', {}, head)), F.el('tbody', {}, rows)),
        found.rows.length > SHOWN && !this.more
          ? F.el(
              'div',
              { style: 'padding:4px 6px' },
              F.el('button', { type: 'button', class: 'ft-btn quiet', onclick: more }, `Show ${found.rows.length}`),
            )
          : null,
      );
    }
    async save() {
      const all = await this.ask();
      F.csv(
        'comparisons.csv',
        KEPT,
        all.rows.map(r => {
          const extra = r.extra || {},
            s = extra.settings || {},
            names = r.variants.map(v => v.name).join('; ');
          return [
            new Date(r.created * 1000).toISOString(),
            r.prompt,
            names,
            r.winner === null ? 'tie' : r.winner,
            extra.blind ? 'yes' : 'no',
            r.seed,
            s.temperature,
            s.top_p,
            s.new_tokens,
            JSON.stringify(r.texts),
          ];
        }),
      );
    }

    /* ---------- speed and memory of what stands above ---------- */
    measured(may, busy) {
      const $ = this.$,
        done = this.cards.measured;
      this.shown = may && done.length > 0 && !this.cards.hidden();
      this.busy = busy;
      const again = () => this.measured(true, busy);
      F.replace($('[data-speed-tools]'), this.shown ? this.toggle('speed', again) : []);
      F.replace($('[data-memory-tools]'), this.shown ? this.toggle('memory', again) : []);
      if (this.shown) {
        this.speed(done);
        this.memory(done);
        return;
      }
      const wait = this.cards.length && this.cards.hidden() ? 'Shown after your vote.' : 'Shown when variants have written.';
      F.replace($('[data-speed]'), none(wait, 'padding:6px 8px'));
      F.replace($('[data-memory]'), none(wait));
    }
    /* tokens/s over windows of a twelfth of the text: single tokens are too noisy to read */
    points(card) {
      const t = card.tokens.slice(1),
        w = Math.max(4, Math.ceil(t.length / 12)),
        out = [];
      for (let i = 0; i + w <= t.length; i += w) {
        const seconds = t.slice(i, i + w).reduce((sum, x) => sum + x[3], 0) / 1000;
        out.push([(card.figures.prompt_tokens || 0) + i + 1 + w / 2, w / seconds]);
      }
      return out;
    }
    speed(done) {
      const box = this.$('[data-speed]'),
        lines = done.map(c => ({ c, points: this.points(c) })),
        long = lines.filter(l => l.points.length > 1);
      const busy = this.busy
        ? F.el(
            'p',
            { class: 'mi dim', style: 'padding:0 8px 4px' },
            'A run computes on this machine: speeds are lower than when it is idle.',
          )
        : null;
      if (this.tables.speed) {
        const columns = [
          { name: 'Variant' },
          { name: 'Length', unit: 'tokens', r: true },
          { name: 'Speed', unit: 'tokens/s', r: true, f: v => F.fig(v) },
        ];
        F.replace(
          box,
          F.table(
            columns,
            lines.flatMap(l => l.points.map(p => [l.c.v.name, Math.round(p[0]), p[1]])),
          ),
          busy,
        );
      } else
        F.replace(
          box,
          long.length
            ? this.plot(long, box.clientWidth - 10)
            : none('Too few tokens for a curve. Ask for more new tokens.', 'padding:6px 8px'),
          busy,
        );
    }
    memory(done) {
      const mb = b => F.fig(b / 1e6),
        kv = c => c.figures.kv_bytes || 0,
        whole = c => c.figures.weight_bytes + kv(c),
        box = this.$('[data-memory]');
      if (this.tables.memory) {
        const rows = done.map(c => [
          c.v.name,
          mb(c.figures.weight_bytes),
          F.finite(c.figures.kv_bytes) ? mb(kv(c)) : 'no figure',
        ]);
        return F.replace(
          box,
          F.table(
            [{ name: 'Variant' }, { name: 'Weights', unit: 'MB', r: true }, { name: 'KV cache', unit: 'MB', r: true }],
            rows,
          ),
        );
      }
      const most = Math.max(...done.map(whole)),
        rss = Math.max(...done.map(c => c.figures.rss_bytes || 0));
      const part = (bytes, token) => F.el('i', { style: `width:${(95 * bytes) / most}%;background:var(--ft-part-${token})` });
      const key = (token, words) => F.el('span', {}, F.el('i', { class: 'swatch', style: `--c:var(--ft-part-${token})` }), words);
      F.replace(
        box,
        F.el(
          'div',
          { class: 'ft-bars' },
          done.map(c => [
            F.el('b', { title: c.v.name }, c.letter),
            F.el('span', { class: 'ft-stack' }, part(c.figures.weight_bytes, 'weights'), part(kv(c), 'kv')),
            F.num(mb(whole(c)), 'MB', 'num r'),
          ]),
        ),
        F.el('p', { class: 'ft-key' }, key('weights', 'Weights'), key('kv', 'KV cache at the end')),
        F.el('p', { class: 'mi dim' }, `Process and libraries: ${F.gb(rss)} for all together`),
      );
    }
    plot(lines, w) {
      const h = 152,
        m = { l: 38, r: 26, t: 12, b: 22 },
        all = lines.flatMap(l => l.points),
        top = tall(Math.max(...all.map(p => p[1])) / 3) * 3;
      const x0 = Math.min(...all.map(p => p[0])),
        x1 = Math.max(...all.map(p => p[0]));
      const X = v => m.l + ((v - x0) / Math.max(1, x1 - x0)) * (w - m.l - m.r),
        Y = v => h - m.b - (v / top) * (h - m.t - m.b);
      const aria =
        'Decode speed at each length: ' +
        lines.map(l => `${l.c.letter} ${F.fig(l.c.figures.tokens_per_second)} tokens/s`).join(', ');
      const svg = F.svg('svg', { class: 'ft-try-plot', width: w, height: h, role: 'img', 'aria-label': aria });
      for (let i = 0; i <= 3; i++) {
        const v = (top / 3) * i,
          y = Y(v) + 0.5;
        svg.append(
          F.svg('line', { class: i ? 'grid' : 'axis', x1: m.l, x2: w - m.r, y1: y, y2: y }),
          F.svg('text', { x: m.l - 6, y: y + 4, 'text-anchor': 'end' }, v ? F.fig(v) : '0'),
        );
      }
      for (const v of [x0, (x0 + x1) / 2, x1])
        svg.append(F.svg('text', { x: X(v), y: h - 7, 'text-anchor': 'middle' }, String(Math.round(v))));
      const ends = lines.map(l => this.curve(svg, l, X, Y)).sort((a, b) => a.y - b.y);
      for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + 13);
      const deep = Math.max(0, (ends.at(-1)?.y ?? 0) - (h - m.b - 3));
      for (const e of ends) e.y -= deep;
      for (const e of ends) svg.append(F.svg('text', { class: 'halo', x: e.x, y: e.y + 4 }, e.t));
      return svg;
    }
    curve(svg, line, X, Y) {
      const k = look(line.c.v),
        at = line.points.map(p => [X(p[0]), Y(p[1])]),
        d = at.map(([x, y], i) => `${i ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('');
      svg.append(
        F.svg('path', { d, fill: 'none', style: `stroke:${k.css};stroke-width:1.75`, 'stroke-dasharray': DASH[k.dash] }),
      );
      for (const [x, y] of at)
        svg.append(
          F.svg('path', {
            d: PATHS[k.symbol],
            transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(.65)`,
            style: `fill:${k.css}`,
          }),
        );
      const [x, y] = at[at.length - 1];
      return { x: x + 7, y, t: line.c.letter };
    }
  };
})();
