/* Library: models, data and methods as lists with their cards. What is chosen is in the address, so that it can be shared. */
(() => {
  'use strict';
  const { h, familyName, architecture, segmented, button, note, sentence, asking } = fettle.form,
    parts = fettle.parts;
  const { whole: count, count: short, icon, family: familyIcon, query } = fettle,
    fill = fettle.replace;
  const { methodCard, modelCard, dataCard, LIMIT } = parts.cards;
  const SHELVES = [
    ['models', 'Models'],
    ['data', 'Data'],
    ['methods', 'Methods'],
    ['leaderboard', 'Leaderboard'],
  ];
  const ONE = { models: 'model', data: 'data', methods: 'method' };

  const root = element.querySelector('.lib'),
    $ = s => root.querySelector(s),
    S = asking(server, ['shelves', 'model', 'data_card', 'claims', 'leaderboard']);
  const shortTitle = s => {
    const t = String(s)
      .split(/[.;:(]/)[0]
      .trim();
    return t.length > 60 ? t.slice(0, 57) + '…' : t;
  };

  async function mount() {
    const all = await S.shelves({}, { retry: true });
    if (all.error) {
      fill($('.ft-detail'), note('bad', sentence(all.error)));
      root.removeAttribute('aria-busy');
      return;
    }
    let shelf = 'methods',
      family = '',
      text = '',
      chosen = { models: '', data: '', methods: '' };
    for (const [s] of SHELVES)
      if (query.get(ONE[s])) {
        shelf = s;
        chosen[s] = query.get(ONE[s]);
      }
    if (query.get('shelf') && SHELVES.some(([s]) => s === query.get('shelf'))) shelf = query.get('shelf');

    /* ---- title row ---- */
    const seg = segmented(
      'Shelf',
      SHELVES.map(([s, t]) => [s, all[s] ? `${t} ${all[s].length}` : t]),
      shelf,
      s => {
        shelf = s;
        family = '';
        remember();
        build();
      },
    );
    const search = h('input', {
      class: 'ft-in',
      type: 'search',
      oninput: () => {
        text = search.value.trim().toLowerCase();
        shelf === 'leaderboard' ? board.search(text) : rows();
      },
    });
    const chips = h('span', { class: 'ft-chips', role: 'group', 'aria-label': 'Family' });
    const switches = h('span', { class: 'lb-switches', hidden: true });
    const copyButton = button(
      'Copy as command',
      'i-copy',
      () =>
        fettle.copy(
          shelf === 'leaderboard' ? board.command() : `python -m workbench ${shelf}${chosen[shelf] ? ' ' + chosen[shelf] : ''}`,
          'Command copied',
        ),
      'quiet only-wide',
    );
    fill(
      $('.lib-title'),
      h('h1', null, 'Library'),
      seg,
      switches,
      h('span', { class: 'row lib-search' }, icon('i-search', 'dim'), search),
      chips,
      h('span', { class: 'grow' }),
      copyButton,
    );
    const remember = () =>
      query.set({
        shelf: shelf === 'methods' ? null : shelf,
        model: null,
        data: null,
        method: null,
        ...board.forget,
        ...(shelf === 'leaderboard' ? board.query() : {}),
        ...(chosen[shelf] ? { [ONE[shelf]]: chosen[shelf], shelf: null } : {}),
      });

    const board = parts.leaderboard($('.lib-board'), switches, () => S.leaderboard({}), () => shelf === 'leaderboard' && remember());

    /* ---- list ---- */
    const found = () =>
      all[shelf].filter(
        r => (!family || r.family === family) && (!text || text.split(/\s+/).every(w => haystack(r).includes(w))),
      );
    const haystack = r =>
      shelf === 'methods'
        ? parts.searchText(r)
        : [r.id, r.title, r.task, r.architecture, (r.card || {}).text].join(' ').toLowerCase();
    const body = $('.lib-list .ft-body');
    const pick = (id, focus) => {
      chosen[shelf] = id;
      remember();
      rows();
      detail();
      if (focus) {
        const d = $('.lib-detail');
        if (matchMedia('(max-width: 1180px)').matches) d.scrollIntoView({ block: 'start' });
      }
    };
    const columns = {
      methods: [['Method'], ['Family', 108], ['Obeys', 76]],
      models: [['Model'], ['Task', 136], ['Parameters', 84, 1]],
      data: [['Data'], ['Task', 136], ['Train', 66, 1]],
    };
    const cells = r =>
      shelf === 'methods'
        ? [
            h('td', { class: 'ell' }, link(r, r.name), ' ', h('span', { class: 'dim' }, shortTitle(r.summary))),
            h(
              'td',
              { class: 'dim' },
              h('span', { class: 'row', style: 'gap:5px' }, familyIcon(r.family, 's'), familyName(r.family)),
            ),
            h('td', { class: 'dim' }, [...new Set(r.hyperparameters.map(f => LIMIT[f.lever]).filter(Boolean))].join(', ')),
          ]
        : shelf === 'models'
          ? [
              h('td', { class: 'ell' }, link(r, r.id), ' ', h('span', { class: 'dim' }, architecture(r.architecture))),
              h('td', { class: 'dim' }, r.task),
              h('td', { class: 'r num' }, r.parameters ? short(r.parameters) : '–'),
            ]
          : [
              h('td', { class: 'ell' }, link(r, r.id), ' ', h('span', { class: 'dim' }, r.title)),
              h('td', { class: 'dim' }, r.task),
              h('td', { class: 'r num' }, r.train ? count(r.train) : '–'),
            ];
    const link = (r, t) =>
      h(
        'a',
        {
          href: `/library?${ONE[shelf]}=${encodeURIComponent(r.id)}`,
          'data-id': r.id,
          'aria-current': r.id === chosen[shelf] ? 'true' : null,
        },
        h('b', null, t),
      );
    const rows = () => {
      const f = found(),
        had = body.contains(document.activeElement) ? document.activeElement.dataset.id : null;
      fill($('#h-list'), shelf === 'methods' && family ? familyName(family) : SHELVES.find(([s]) => s === shelf)[1]);
      fettle.text($('.lib-list .sub'), f.length === all[shelf].length ? String(f.length) : `${f.length} of ${all[shelf].length}`);
      const c = columns[shelf];
      fill(
        body,
        f.length
          ? h(
              'table',
              { class: 'ft-table ft-list' },
              h('colgroup', null, ...c.map(([, w]) => h('col', { style: w ? `width:${w}px` : null }))),
              h('thead', null, h('tr', null, ...c.map(([t, , r]) => h('th', { scope: 'col', class: r ? 'r' : null }, t)))),
              h(
                'tbody',
                null,
                ...f.map(r => h('tr', { 'aria-selected': String(r.id === chosen[shelf]), 'data-id': r.id }, ...cells(r))),
              ),
            )
          : h(
              'div',
              { class: 'ft-empty' },
              h(
                'h3',
                null,
                all[shelf].length
                  ? 'Nothing matches'
                  : shelf === 'models'
                    ? 'No model is bundled with this copy'
                    : 'Nothing here',
              ),
              h(
                'p',
                null,
                all[shelf].length
                  ? `No entry has “${search.value.trim()}” in its name, paper or description.`
                  : 'New run also takes a local folder, a file or a hub id.',
              ),
              all[shelf].length
                ? button('Clear the search', null, () => {
                    search.value = '';
                    text = '';
                    family = '';
                    build();
                  })
                : h('a', { class: 'ft-btn', href: '/' }, 'Set up a run'),
            ),
      );
      if (had) {
        const a = body.querySelector(`a[data-id="${CSS.escape(had)}"]`);
        if (a) a.focus({ preventScroll: true });
      }
    };
    body.addEventListener('click', e => {
      const tr = e.target.closest('tr[data-id]');
      if (!tr || e.metaKey || e.ctrlKey || e.shiftKey) return;
      e.preventDefault();
      pick(tr.dataset.id, true);
    });
    body.addEventListener('keydown', e => {
      if (e.key !== 'ArrowDown' && e.key !== 'ArrowUp') return;
      const a = [...body.querySelectorAll('a[data-id]')],
        i = a.indexOf(document.activeElement),
        n = a[i + (e.key === 'ArrowDown' ? 1 : -1)];
      if (i >= 0 && n) {
        e.preventDefault();
        n.focus();
        pick(n.dataset.id);
      }
    });

    /* ---- details ---- */
    const detail = async () => {
      const id = chosen[shelf],
        at = $('.lib-detail'),
        row = all[shelf].find(r => r.id === id);
      if (!row) {
        fill(
          at,
          h(
            'section',
            { class: 'ft-panel' },
            note(
              id ? 'bad' : 'info',
              id
                ? `There is no ${shelf === 'data' ? 'bundled data set' : ONE[shelf]} called ${id}. Choose one from the list.`
                : 'Choose one from the list.',
            ),
          ),
        );
        return;
      }
      if (shelf === 'methods') {
        fill(at, methodCard(row, all.methods));
        const got = await S.claims({ method: id });
        if (chosen.methods === id && shelf === 'methods' && !got.error) fill(at, methodCard(row, all.methods), parts.claimCards(got.rows));
      } else if (shelf === 'data') fill(at, dataCard(row));
      else {
        const got = await S.model({ source: id });
        if (chosen.models === id && shelf === 'models')
          fill(at, got.error ? h('section', { class: 'ft-panel' }, note('bad', sentence(got.error))) : modelCard(got));
      }
    };

    /* the leaderboard takes the whole width; families are worth a filter where it has several */
    const opened = async () => {
      await board.open();
      board.search(text);
      const several = new Set(board.rows().map(r => r.family)).size > 1;
      chips.hidden = !several;
      if (several) fill(chips, ...parts.familyChips(board.rows(), '', f => board.family(f)));
    };
    const build = () => {
      const whole = shelf === 'leaderboard';
      seg.set(shelf);
      search.placeholder = { methods: 'Search methods and papers', models: 'Search models', data: 'Search data', leaderboard: 'Search the rows' }[shelf];
      search.setAttribute('aria-label', search.placeholder);
      chips.hidden = shelf !== 'methods';
      $('.ft-lib').hidden = whole;
      $('.lib-board').hidden = switches.hidden = !whole;
      if (whole) return opened();
      if (shelf === 'methods')
        fill(
          chips,
          ...parts.familyChips(all.methods, family, f => {
            family = f;
            rows();
            if (!found().some(r => r.id === chosen.methods) && found().length) pick(found()[0].id);
          }),
        );
      if (!chosen[shelf] && all[shelf].length) chosen[shelf] = all[shelf][0].id;
      rows();
      detail();
    };
    build();
    /* in a long list the chosen one is brought into view, without moving the page */
    const row = body.querySelector('tr[aria-selected="true"]');
    if (row && body.scrollHeight > body.clientHeight) body.scrollTop = row.offsetTop - body.clientHeight / 2;
    root.removeAttribute('aria-busy');
  }
  mount();
})();
