/* The Leaderboard shelf of the Library: one arena at a time, quality against cost beside a table. What is chosen is in the address.

   const board = fettle.parts.leaderboard(node, switches, ask, change);
   await board.open();  board.search('lora');  board.family('adaptation');  board.command();  board.query() */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, segmented, note, sentence, plain } = fettle.form,
    F = fettle,
    fill = F.replace,
    query = F.query;
  const SIDES = [
    ['steps', 'Equal steps'],
    ['seconds', 'Equal seconds'],
  ];
  const KEYS = ['arena', 'at', 'x', 'sort', 'row'];

  fettle.parts.leaderboard = (node, switches, ask, change) => {
    const { command, use } = fettle.parts.cards;
    const S = { arena: query.get('arena') || '', at: query.get('at') || 'steps', px: query.get('x') || 'pace', sort: query.get('sort') || 'rank', row: query.get('row') || '' };
    let arenas = null,
      arena = null,
      text = '',
      family = '',
      chart = null,
      table = null;
    const $ = s => node.querySelector(s);
    const fullName = r => [r.short, r.form].filter(Boolean).join(' ');
    const found = () =>
      arena.rows.filter(
        r =>
          (!family || r.family === family) &&
          (!text || text.split(/\s+/).every(w => `${r.id} ${r.name} ${r.form} ${r.family}`.toLowerCase().includes(w))),
      );

    const empty = (title, words, ...more) => fill(node, h('section', { class: 'ft-panel lb-none' }, h('div', { class: 'ft-empty' }, h('h3', null, title), h('p', null, words), ...more)));

    const frame = () => {
      const head = (id, title, part) => h('header', { class: 'ft-head' }, h('h2', { id }, title), h('span', { class: 'sub', 'data-sub': part }), h('span', { class: 'ft-tools', 'data-tools': part }));
      fill(
        node,
        h(
          'div',
          { class: 'lb-side' },
          h(
            'section',
            { class: 'ft-panel', 'aria-labelledby': 'h-lb-chart' },
            head('h-lb-chart', 'Quality against cost', 'chart'),
            h('div', { class: 'ft-body chart', 'data-chart': '' }),
            h('div', { class: 'lb-picked', 'aria-live': 'polite' }),
          ),
          h('section', { class: 'ft-panel lb-last', 'aria-labelledby': 'h-lb-how' }, h('header', { class: 'ft-head' }, h('h2', { id: 'h-lb-how' }, 'How this was measured')), h('div', { class: 'ft-body lb-how' })),
        ),
        h(
          'section',
          { class: 'ft-panel lb-main', 'aria-labelledby': 'h-lb-table' },
          head('h-lb-table', 'Leaderboard', 'table'),
          h('div', { class: 'ft-scroll lb-scroll', tabindex: 0, role: 'region', 'aria-label': 'Table of the methods' }),
          h('div', { class: 'ft-tierline' }),
        ),
      );
      chart = new F.MethodFront($('[data-chart]'), $('[data-tools="chart"]'), $('[data-sub="chart"]'), {
        state: S,
        change: v => set(v),
        choose: id => choose(id, true),
        enter: id => {
          const tr = table.choose(id, true);
          if (tr) tr.querySelector('a').focus();
        },
      });
      table = new F.MethodTable($('.lb-scroll'), { sort: sort => set({ sort }), choose: id => choose(id, false) });
    };

    const set = values => {
      Object.assign(S, values);
      change();
      paint();
    };
    const choose = (id, show) => {
      if (S.row !== id) {
        S.row = id;
        change();
      }
      table.choose(id, show);
      chart.ring(id);
      picked();
    };

    /* the chosen row in words, so that a click in the chart says enough without the table */
    const picked = () => {
      const r = arena.rows.find(x => x.id === S.row),
        at = $('.lb-picked'),
        key = r ? `${arena.id} ${r.id} ${S.at}` : '';
      if (at.dataset.key === key) return;
      at.dataset.key = key;
      if (!r) return fill(at, h('p', { class: 'dim sm' }, 'Filled points are on the front: nothing here is both better and cheaper. Bars are the range over seeds. Choose a point or a row.'));
      const read = r[S.at],
        costs = [
          F.finite(r.pace) ? `${F.fixed(r.pace, 2)} × LoRA’s time a step` : 'time a step not measured',
          F.finite(r.peak) ? F.size(r.peak) + ' peak' : '',
          `${F.whole(r.trainable)} trained`,
          F.finite(r.rate) ? `rate ${plain(+r.rate.toPrecision(2))}` : '',
        ];
      fill(
        at,
        h(
          'div',
          { class: 'grow' },
          h(
            'p',
            { class: 'row wrap lb-name' },
            F.family(r.family, 's'),
            h('b', null, fullName(r)),
            read ? h('span', { class: 'mut' }, `${F.ordinal(read.rank)} of ${arena.rows.filter(x => x[S.at]).length}`, read.tier ? `, tier ${read.tier}` : '') : null,
          ),
          h(
            'p',
            { class: 'sm num lb-facts' },
            read
              ? `${F.fig(read.value, 4)} ${arena.metric} (${F.fig(read.low, 4)} to ${F.fig(read.high, 4)}) after ${F.whole(read.steps)} steps`
              : `no figure at equal ${S.at}`,
          ),
          h('p', { class: 'sm mut lb-facts' }, costs.filter(Boolean).join(', ')),
        ),
        h('div', { class: 'lb-go' }, use('method', r.use, ''), h('a', { class: 'ft-btn quiet', href: `/library?method=${encodeURIComponent(r.method)}` }, 'Its card')),
      );
    };

    const how = () => {
      const took = F.finite(arena.reference) && arena.steps ? `${F.whole(arena.steps)} steps, about ${F.fig(arena.steps * arena.reference, 2)} s with LoRA` : 'a short training';
      fill(
        $('.lb-how'),
        h('p', { class: 'sm' }, arena.setting + '.'),
        h(
          'p',
          { class: 'sm mut' },
          S.at === 'steps'
            ? 'Equal steps: every method takes as many.'
            : 'Equal seconds: every method takes as many steps as fit into the time that LoRA needs for its own.',
          ' Peak is the memory of the training above the loaded model.',
        ),
        note(
          'info',
          `Measured by the makers of Fettle on ${arena.date}: ${arena.machine}, ${arena.seeds} seeds. A small model and ${took}: a longer training of a larger model may order the methods otherwise.`,
        ),
        arena.failed.length ? note('warn', ...arena.failed.map(f => h('p', null, h('b', null, f.name), ` failed: ${f.reason}`))) : null,
        h('p', { class: 'ft-h lib-gap' }, 'Measured again with'),
        command(arena.command),
      );
    };

    const paint = () => {
      const rows = found(),
        measured = rows.filter(r => r[S.at]).length;
      F.text($('[data-sub="table"]'), `${rows.length === arena.rows.length ? rows.length : `${rows.length} of ${arena.rows.length}`} rows, ${arena.metric}, ${arena.lower ? 'lower' : 'higher'} is better${measured < rows.length ? `; ${rows.length - measured} not measured at equal ${S.at}` : ''}`);
      if (rows.length) table.show(arena, rows, S, S.row);
      else fill($('.lb-scroll'), h('div', { class: 'ft-empty' }, h('h3', null, 'Nothing matches'), h('p', null, 'No row has these words in its method’s name.')));
      chart.show(arena, rows, S);
      chart.ring(S.row || null);
      fill(
        $('.lb-main .ft-tierline'),
        h(
          'p',
          null,
          h('b', null, 'Tiers: '),
          'methods with the same letter cannot be told apart from the best of that letter',
          ` (paired test on the same held-out items, corrected for all pairs, 5${F.NB}%). The dotted line is LoRA.`,
        ),
      );
      how();
      picked();
    };

    const show = () => {
      arena = arenas.find(a => a.id === S.arena) || arenas[0];
      S.arena = arena.id;
      if (!SIDES.some(([v]) => v === S.at) || !arena.rows.some(r => r[S.at])) S.at = 'steps';
      // An arena may lack a cost: its chart begins with one that it has.
      const costs = F.MethodFront.costs.filter(c => arena.rows.some(r => F.finite(r[c])));
      if (!costs.includes(S.px)) S.px = costs[0] || 'pace';
      if (!F.MethodTable.sorts(S.sort)) S.sort = 'rank';
      if (!arena.rows.some(r => r.id === S.row)) S.row = '';
      fill(
        switches,
        segmented('Arena', arenas.map(a => [a.id, a.title]), S.arena, v => {
          S.arena = v;
          show();
          change();
        }),
        segmented('Compared at', SIDES, S.at, v => set({ at: v })),
      );
      paint();
    };

    return {
      async open() {
        if (!arenas) {
          const got = await ask();
          if (got.error) return fill(node, h('section', { class: 'ft-panel' }, note('bad', sentence(got.error))));
          arenas = got.arenas;
          if (arenas.length) {
            frame();
            show();
          }
        }
        if (!arenas.length)
          empty(
            'No leaderboard comes with this copy',
            'It is a file of figures, assets/leaderboard.json, that a benchmark writes: every adaptation method tuned alike, then read at equal steps and at equal seconds. Measuring it takes a few hours on a laptop.',
            command('python -m benchmarks.adaptation'),
          );
        change();
      },
      search(words) {
        text = words;
        if (arena) paint();
      },
      family(f) {
        family = f;
        if (arena) paint();
      },
      rows: () => (arena ? arena.rows : []),
      command: () => `python -m workbench leaderboard${S.arena ? ' ' + S.arena : ''}${S.at === 'steps' ? '' : ' --at ' + S.at}`,
      query: () => (arena ? { arena: S.arena, at: S.at, x: S.px === 'pace' ? null : S.px, sort: S.sort === 'rank' ? null : S.sort, row: S.row } : {}),
      forget: Object.fromEntries(KEYS.map(k => [k, null])),
    };
  };
})();
