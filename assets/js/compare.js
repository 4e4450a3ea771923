/* Compare: one selection, shown by the table, the overlay, the Pareto front and the differences. All of it is in the URL. */
const F = fettle,
  NB = F.NB;
const root = element.querySelector('.ft-compare');
const $ = s => root.querySelector(s);
const Q = F.query.get;
const S = {
  query: Q('q') || '',
  sort: Q('sort') || '-created',
  page: Math.max(1, +Q('page') || 1),
  group: Q('group') === '1',
  runs: (Q('runs') || '')
    .split(',')
    .map(Number)
    .filter(n => Number.isInteger(n) && n > 0),
  x: ['step', 'tokens', 'seconds', 'joules'].includes(Q('x')) ? Q('x') : 'seconds',
  y: Q('y'),
  smooth: Q('smooth') === null ? 0.85 : Math.min(0.99, Math.max(0, +Q('smooth') || 0)),
  px: Q('px') || 'size',
  pair: (Q('pair') || '').split(',').map(Number).filter(Boolean),
  all: Q('all') === '1',
  at: Q('at'),
};
let touched = Q('runs') !== null,
  data = null,
  seen = null,
  asked = 0,
  charted = '',
  shown = '',
  chosenRuns = [];
const save = () =>
  F.query.set({
    q: S.query,
    sort: S.sort === '-created' ? null : S.sort,
    page: S.page > 1 ? S.page : null,
    group: S.group ? 1 : null,
    runs: S.runs.join(',') || (touched ? '' : null),
    x: S.x === 'seconds' ? null : S.x,
    y: S.y,
    smooth: S.smooth === 0.85 ? null : S.smooth,
    px: S.px === 'size' ? null : S.px,
    pair: S.pair.join(','),
    all: S.all ? 1 : null,
    at: S.at,
  });

/* ---------- the parts ---------- */
const table = new F.RunTable($('[data-table]'), {
  sort: column => {
    S.sort =
      S.sort === column
        ? '-' + column
        : S.sort === '-' + column
          ? '-created'
          : column === 'value' || column === 'name' || column === 'size'
            ? column
            : '-' + column;
    S.page = 1;
    save();
    refresh();
  },
  choose: (ids, on) => choose(ids, on),
  star: async (id, on) => {
    try {
      await F.call(server, 'star', { id, starred: on }, { retry: false });
      refresh();
    } catch (e) {
      F.toast(e.text, 'bad');
    }
  },
  edit: async (id, tags, note) => {
    try {
      await F.call(server, 'keep', { id, tags, note }, { retry: false });
      refresh();
      return true;
    } catch (e) {
      F.toast(e.text, 'bad');
      return false;
    }
  },
  page: p => {
    S.page = p;
    save();
    refresh();
  },
  again: () => data && table.update(data, { sort: S.sort, chosen: S.runs }),
});
const change = values => {
  Object.assign(S, values);
  save();
  charts(true);
};
const overlay = new F.Overlay($('[data-overlay]'), $('[data-overlay-tools]'), $('[data-overlay-sub]'), { state: S, change });
const pareto = new F.Pareto($('[data-pareto]'), $('[data-pareto-tools]'), $('[data-pareto-sub]'), {
  state: S,
  change,
  choose: id => choose([id], !S.runs.includes(id)),
});
const diff = new F.Diff($('[data-diff]'), $('[data-diff-tools]'), $('[data-diff-sub]'), {
  state: S,
  change: v => {
    Object.assign(S, { all: !!v.all });
    save();
  },
});
/* the line of the equal expenditure is drawn where an axis is the same */
const equal = new F.Equal($('[data-equal]'), $('[data-equal-tools]'), $('[data-equal-sub]'), {
  at: S.at,
  ask: given => F.call(server, 'at_equal', given),
  change: (at, axis) => {
    S.at = at;
    save();
    if (axis && axis !== S.x && ['step', 'tokens', 'seconds', 'joules'].includes(axis)) change({ x: axis });
    else if (axis && axis !== S.px && ['trainable', 'size'].includes(axis)) change({ px: axis });
    else lines();
  },
  drawn: () => lines(),
});
const lines = () => {
  S.equal = equal.line();
  overlay.chart?.paint();
  pareto.chart?.paint();
};
const paired = new F.Paired($('[data-paired]'), {
  pick: (a, b) => {
    S.pair = a === b ? [] : [a, b];
    save();
    told();
  },
});

/* ---------- choosing ---------- */
const choose = (ids, on) => {
  touched = true;
  const group = new Map(data ? data.rows.map(r => [r.id, r.ids]) : []);
  const all = ids.flatMap(id => (S.group ? group.get(id) || [id] : [id]));
  S.runs = on ? [...S.runs, ...all.filter(i => !S.runs.includes(i))] : S.runs.filter(i => !all.includes(i));
  save();
  paint();
  charts(true);
};
/* what a person most likely wants to see first: the newest runs that have a result */
const propose = () => {
  if (touched || !data) return;
  const able = data.rows.filter(r => F.finite(r.value)),
    like = able.filter(r => r.data === able[0].data && r.metric === able[0].metric);
  S.runs = like.slice(0, 4).flatMap(r => r.ids.slice(0, 1));
  if (!S.runs.length)
    S.runs = data.rows
      .filter(r => r.status !== 'queued')
      .slice(0, 2)
      .map(r => r.id);
};

/* ---------- the table ---------- */
const has = token => ` ${S.query} `.includes(` ${token} `);
const toggle = token => {
  S.query = has(token) ? ` ${S.query} `.replace(` ${token} `, ' ').trim() : `${S.query} ${token}`.trim();
  $('[data-search]').value = S.query;
  S.page = 1;
  save();
  refresh();
};
const quote = t => (/[\s,"]/.test(t) ? `tag:"${t.replace(/"/g, '')}"` : `tag:${t}`);
const chips = () => {
  const c = data.chips,
    chip = (words, n, token, on = has(token), act = () => toggle(token)) =>
      F.el(
        'button',
        { type: 'button', class: 'ft-chip', 'aria-pressed': on, onclick: act },
        words,
        n === null ? null : F.el('span', { class: 'n' }, n.toLocaleString('en-US')),
      );
  const key = JSON.stringify([c, S.query, S.group]);
  if (key === chips.key) return;
  chips.key = key;
  const focus =
    document.activeElement && $('[data-chips]').contains(document.activeElement)
      ? [...$('[data-chips]').children].indexOf(document.activeElement)
      : -1;
  F.replace(
    $('[data-chips]'),
    c.starred || has('is:starred') ? chip('Starred', c.starred, 'is:starred') : null,
    chip('This week', c.week, 'age:<7d'),
    c.active || has('is:active') ? chip('Active', c.active, 'is:active') : null,
    c.tags.map(([t, n]) => chip(t, n, quote(t))),
    data.all > 1
      ? chip('Group seeds', null, '', S.group, () => {
          S.group = !S.group;
          S.page = 1;
          save();
          refresh();
        })
      : null,
  );
  if (focus >= 0) $('[data-chips]').children[focus]?.focus();
};
const paint = () => {
  table.update(data, {
    sort: S.sort,
    chosen: S.group ? data.rows.filter(r => r.ids.every(i => S.runs.includes(i))).map(r => r.id) : S.runs,
    grouped: S.group,
  });
  chips();
  F.text(
    $('[data-count]'),
    data.all
      ? `${data.total.toLocaleString('en-US')} of ${data.all.toLocaleString('en-US')} ${data.all === 1 ? 'run' : 'runs'}, ${S.runs.length} chosen`
      : '',
  );
  empty();
};
const refresh = async (quiet = false) => {
  /* a tick never supersedes what a person asked for */
  const mine = quiet ? asked : ++asked;
  let found;
  try {
    found = await F.call(server, 'table', {
      query: S.query,
      sort: S.sort,
      page: S.page,
      group: S.group,
      seen: quiet ? seen : null,
    });
  } catch (e) {
    if (mine === asked && !quiet) {
      F.note($('[data-trouble]'), 'bad', e.text);
      $('[data-search]').setAttribute('aria-invalid', e.field === 'query');
    }
    return;
  }
  if (mine !== asked) return;
  F.replace($('[data-trouble]'));
  $('[data-search]').removeAttribute('aria-invalid');
  if (found.same) return;
  if (found.pages < S.page) {
    S.page = found.pages;
    save();
    return refresh();
  }
  seen = found.mark;
  data = found;
  propose();
  paint();
  charts();
};
const action = (words, href, cls = '') => F.el('a', { class: `ft-btn ${cls}`, href }, words);
const empty = () => {
  const box = $('[data-empty]'),
    kind = !data.all ? 'none' : !data.total ? 'nothing' : data.all === 1 ? 'one' : '';
  $('[data-table]').parentNode.hidden = !data.all;
  $('[data-panels]').hidden = !data.all || (!data.total && !S.runs.length);
  if (kind === shown) return;
  shown = kind;
  const say = (title, words, ...actions) =>
    F.replace(
      box,
      F.el(
        'section',
        { class: 'ft-panel' },
        F.el(
          'div',
          { class: 'ft-empty' },
          F.el('h3', {}, title),
          F.el('p', {}, words),
          F.el('div', { class: 'row wrap' }, actions),
        ),
      ),
    );
  if (kind === 'none')
    say(
      'No runs yet',
      'Runs appear here with their quality, size, speed and memory as soon as one is started. The example needs about two minutes.',
      action('Start the example', '/?preset=example', 'primary'),
      action('Set up your own', '/'),
    );
  else if (kind === 'nothing')
    say(
      'No run fits this filter',
      'Take a word away, or clear it.',
      F.el(
        'button',
        {
          type: 'button',
          class: 'ft-btn primary',
          onclick: () => {
            S.query = '';
            $('[data-search]').value = '';
            save();
            refresh();
          },
        },
        'Clear the filter',
      ),
    );
  else if (kind === 'one')
    say(
      'One run so far',
      'Two runs on the same data can be compared item by item. The cheapest second run has the same settings with one change, or another seed.',
      action('Clone settings', `/?clone=${data.rows[0] ? data.rows[0].id : ''}`, 'primary'),
      action('Set up another', '/'),
    );
  else F.replace(box);
};

/* ---------- charts and differences of what is chosen ---------- */
let turn = 0;
const charts = async (force = false) => {
  if (!data || $('[data-panels]').hidden) return;
  const live = data.active > 0,
    key = JSON.stringify([S.runs, S.x, S.y, S.px, S.query, seen]);
  if (!force && !live && key === charted) return;
  const anew = force || key !== charted || equal.stale();
  charted = key;
  const mine = ++turn,
    ids = S.runs,
    ask = (name, given) => F.call(server, name, given);
  try {
    const [curves, front, fields, names] = await Promise.all([
      ids.length ? ask('curves', { ids, x: S.x, y: S.y }) : null,
      ask('front', { ids, query: S.query, x: S.px }),
      ask('differences', { ids }),
      ask('names', { ids }),
    ]);
    if (mine !== turn) return;
    chosenRuns = names.runs;
    /* a shared link may name runs that are gone */
    if (chosenRuns.length < S.runs.length) {
      S.runs = chosenRuns.map(r => r.id);
      save();
      paint();
    }
    overlay.show(curves || { series: [], y: 'loss', name: 'Choose runs in the table', unit: '', runs: [], base: null });
    pareto.show(front);
    diff.show(fields);
    if (anew) equal.refresh(ids);
    told();
  } catch (e) {
    if (mine === turn) F.note($('[data-trouble]'), 'bad', e.text);
  }
};
let toldFor = '',
  ranked = '';
const told = async () => {
  const can = chosenRuns.filter(r => r.has);
  let pair =
    S.pair.length === 2 && S.pair.every(i => can.some(r => r.id === i)) ? S.pair : can.length > 1 ? [can[0].id, can[1].id] : null;
  paired.runs(can, pair);
  const key = JSON.stringify([pair, seen]);
  if (!pair || key === toldFor) {
    if (!pair) {
      toldFor = '';
      paired.rank(null);
    }
    return;
  }
  toldFor = key;
  const list = JSON.stringify([can.map(r => r.id), can.map(r => r.status)]);
  if (list !== ranked) {
    ranked = list;
    F.call(server, 'ranks', { ids: can.map(r => r.id) })
      .then(t => {
        if (list === ranked) paired.rank(t);
      })
      .catch(e => console.warn(e));
  }
  try {
    const t = await F.call(server, 'apart', { a: pair[0], b: pair[1] });
    if (key === toldFor) paired.show(t);
  } catch (e) {
    F.toast(e.text, 'bad');
  }
};

/* ---------- taking it along ---------- */
F.takeAlong(root, server, {
  ids: () => S.runs,
  names: () => chosenRuns.map(r => r.name),
  at: () => S.at && S.at.replace(':', '='),
  link: () => {
    touched = true;
    save();
    return location.href;
  },
});
$('[data-search]').value = S.query;
const find = F.debounce(() => {
  S.query = $('[data-search]').value.trim();
  S.page = 1;
  save();
  refresh();
}, 180);
$('[data-search]').addEventListener('input', find);
$('[data-search]').addEventListener('search', find);

/* ---------- while runs are on ---------- */
let ticking = false;
const tick = async () => {
  if (!element.isConnected) return clearInterval(timer);
  if (ticking || document.hidden || F.isLost()) return;
  ticking = true;
  try {
    await refresh(true);
    if (data && data.active) await charts();
  } finally {
    ticking = false;
  }
};
const timer = setInterval(tick, 1000);
addEventListener('fettle-back', () => refresh());
refresh();
