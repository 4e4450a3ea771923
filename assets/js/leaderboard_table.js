/* The leaderboard as a table: sorted by any column, tiers as letters with a bracket, the range over seeds on one scale.

   const table = new fettle.MethodTable(scroller, {sort: column => ..., choose: id => ...});
   table.show(arena, rows, {at, sort}, chosen) */
(() => {
  'use strict';
  const F = window.fettle;
  const { scale, plot, figure, WIDTH } = F.intervals;
  const MARK = { css: 'var(--ft-ink-2)', symbol: 'circle' };
  /* id, name, unit, whether numbers go to the right; of(row, side) is what is sorted */
  const COLUMNS = [
    { id: 'rank', name: '#', r: true, of: (r, at) => r[at] && r[at].rank, title: 'Place by quality' },
    { id: 'tier', name: 'Tier' },
    { id: 'name', name: 'Method', of: r => `${r.name} ${r.form}`.toLowerCase() },
    { id: 'value', name: 'Quality', of: (r, at) => r[at] && r[at].value },
    { id: 'range', name: 'Range over seeds', cls: 'fo w' },
    { id: 'trainable', name: 'Trained', r: true, of: r => r.trainable },
    { id: 'pace', name: 's/step', unit: '× LoRA', r: true, of: r => r.pace, title: 'Time a step; LoRA takes 1' },
    { id: 'peak', name: 'Peak', unit: 'MB', r: true, of: r => r.peak, title: 'Peak memory of the training above the loaded model' },
    { id: 'optimizer', name: 'Optimizer', unit: 'MB', r: true, of: r => r.optimizer, title: 'What the optimizer keeps' },
    { id: 'rate', name: 'Rate', r: true, of: r => r.rate, title: 'Learning rate that the search found' },
    { id: 'use', name: '' },
  ];

  F.MethodTable = class {
    constructor(node, on) {
      Object.assign(this, { node, on });
      const row = e => e.target.closest('tr[data-id]');
      node.addEventListener('click', e => row(e) && !e.target.closest('a') && on.choose(row(e).dataset.id));
      node.addEventListener('focusin', e => row(e) && on.choose(row(e).dataset.id));
    }
    static sorts(name) {
      return COLUMNS.some(c => c.of && c.id === name.replace('-', ''));
    }
    sorted(rows, { at, sort }) {
      const column = COLUMNS.find(c => c.id === sort.replace('-', '')),
        way = sort.startsWith('-') ? -1 : 1,
        none = v => v === null || v === undefined;
      return [...rows].sort((a, b) => {
        const [x, y] = [column.of(a, at), column.of(b, at)];
        return none(x) || none(y) ? none(x) - none(y) : (x < y ? -1 : x > y ? 1 : 0) * way;
      });
    }
    show(arena, rows, state, chosen) {
      const { at, sort } = state,
        list = this.sorted(rows, state),
        read = r => ({ ...(r[at] || {}), metric: arena.metric, mark: MARK }),
        s = scale(list.map(read)),
        lora = arena.rows.find(r => r.id === 'lora'),
        base = lora && lora[at] ? lora[at].value : null,
        had = this.node.contains(document.activeElement) && document.activeElement.dataset.key;
      const table = F.table(
        COLUMNS.map(c => ({ name: this.head(c, arena, sort, s), r: c.r, f: v => v })),
        list.map((r, i) => this.cells(r, r[at], { bracket: sort === 'rank', before: list[i - 1], at, plot: () => plot(read(r), s, base) })),
        { class: 'ft-table ft-runs lb-table', 'aria-label': `${arena.title}, best first at equal ${at}` },
      );
      COLUMNS.forEach((c, i) => {
        const cells = [...table.rows].map(tr => tr.cells[i]);
        for (const cell of cells) {
          cell.classList.add('lb-' + c.id, ...(c.cls || '').split(' ').filter(Boolean));
          if (c.title && cell.tagName === 'TH') cell.title = c.title;
        }
        if (c.id === sort.replace('-', '')) cells[0].setAttribute('aria-sort', sort.startsWith('-') ? 'descending' : 'ascending');
      });
      list.forEach((r, i) => (table.tBodies[0].rows[i].dataset.id = r.id));
      F.replace(this.node, table);
      this.choose(chosen);
      if (had) this.node.querySelector(`[data-key="${CSS.escape(had)}"]`)?.focus({ preventScroll: true });
    }
    head(c, arena, sort, s) {
      if (c.id === 'range')
        return F.el(
          'div',
          { class: 'ft-chart' },
          F.el('span', { class: 'vh' }, c.name),
          F.svg(
            'svg',
            { width: WIDTH, height: 14, viewBox: `0 0 ${WIDTH} 14`, 'aria-hidden': 'true' },
            (s ? s.ticks : []).map(t =>
              F.svg('text', { x: 6 + ((t - s.a) / (s.b - s.a)) * (WIDTH - 12), y: 11, 'text-anchor': 'middle' }, t.toFixed(s.places)),
            ),
          ),
        );
      const unit = c.id === 'value' ? arena.metric : c.unit,
        words = [c.name || F.el('span', { class: 'vh' }, 'Use in a run'), unit ? F.el('span', { class: 'u' }, ' ' + unit) : null];
      if (!c.of) return F.el('span', {}, words);
      const on = sort.replace('-', '') === c.id,
        down = sort.startsWith('-');
      return F.el(
        'button',
        {
          type: 'button',
          class: 'sorter',
          'data-sort': c.id,
          'data-key': 'sort ' + c.id,
          onclick: () => this.on.sort(on && !down ? '-' + c.id : c.id),
        },
        words,
        F.el('span', { 'aria-hidden': 'true' }, on ? F.NB + (down ? '▾' : '▴') : ''),
      );
    }
    cells(r, read, { bracket, before, at, plot }) {
      const same = bracket && read && before && before[at] && before[at].tier === read.tier,
        mb = v => (F.finite(v) ? F.fig(v / 1e6) : ''),
        name = `${r.name}${r.form ? ' ' + r.form : ''}`;
      return [
        read ? String(read.rank) : '',
        !read || !read.tier ? '' : same ? [F.el('span', { class: 'vh' }, read.tier), F.el('span', { class: 'tl' })] : F.el('b', { class: 'tier' }, read.tier),
        [
          F.el('a', { href: `/library?method=${encodeURIComponent(r.method)}`, title: `The card of ${r.name}`, 'data-key': r.id }, r.short),
          r.form ? F.el('span', { class: 'ft-tag' }, r.form) : null,
        ],
        read
          ? [F.el('b', {}, figure(read.value)), F.finite(read.low) ? F.el('span', { class: 'u' }, ` ${figure(read.low)} to ${figure(read.high)}`) : null]
          : F.el('span', { class: 'dim' }, 'not measured'),
        F.el('div', { class: 'ft-chart' }, read ? plot() : null),
        F.whole(r.trainable),
        F.finite(r.pace) ? F.fixed(r.pace, 2) : F.el('span', { class: 'dim' }, '–'),
        mb(r.peak),
        mb(r.optimizer),
        F.finite(r.rate) ? F.form.plain(+r.rate.toPrecision(2)) : '',
        F.el(
          'a',
          { class: 'ft-btn icon', href: `/?method=${encodeURIComponent(r.use)}`, 'aria-label': `Use ${name} in a run`, title: `Use ${name} in a run` },
          F.icon('plus', 's'),
        ),
      ];
    }
    choose(id, show) {
      for (const tr of this.node.querySelectorAll('tr[data-id]')) F.attr(tr, 'aria-selected', tr.dataset.id === id);
      const tr = show && this.node.querySelector(`tr[data-id="${CSS.escape(id)}"]`);
      if (tr) this.node.scrollTop = tr.offsetTop - this.node.clientHeight / 2;
      return tr;
    }
  };
})();
