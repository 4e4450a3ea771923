/* Plan, Predict: choose a law, say what it is fitted to, ask it. The choice is in the address, so that it can be shared. */
(() => {
  'use strict';
  const F = fettle,
    { h, button, segmented, note, sentence, asking } = F.form,
    S = asking(server, ['cards', 'predict']),
    NB = F.NB;
  const ORIGIN = { runs: 'Runs of this workbench', points: 'Given points', published: 'Published constants', example: 'Example' };
  const FITTED = {
    runs: 'fitted to runs of this workbench',
    points: 'fitted to the given points',
    published: 'published constants',
    example: 'fitted to synthetic data',
  };
  const RANKED = [
    ['ranked', 'Schedules by predicted end'],
    ['best', 'Best shapes for that time'],
    ['scan', 'Bits under that limit'],
    ['windows', 'Other windows'],
    ['rows', 'Items'],
  ];
  const HEADS = {
    best_share: 'best in',
    step_seconds: 'ms a step',
    average_parameters: 'mean parameters',
    same_best: 'same best',
    dior: 'DIoR',
    share: 'QAT',
    width: 'interval width',
  };
  const root = element.querySelector('.ft');
  let laws = [],
    runs = [],
    law = null,
    turn = 0,
    started = false;
  const drafts = {}; // per law: source, query, text, options
  const draft = () =>
    (drafts[law.id] ||= { source: law.data === 'machine' ? 'runs' : 'runs', query: '', text: '', options: {}, shown: false });

  /* ---- frame ---- */
  const list = h('nav', { class: 'laws-list', 'aria-label': 'Planners' }),
    pick = h('select', { class: 'ft-in ft-sel laws-pick', 'aria-label': 'Planner', onchange: () => choose(pick.value) }),
    title = h('h2', {}),
    sub = h('span', { class: 'sub' }),
    question = h('p', { class: 'laws-question' }),
    form = h('form', {
      class: 'laws-form',
      onsubmit: e => {
        e.preventDefault();
        ask();
      },
    }),
    said = h('div', { class: 'laws-said', 'aria-live': 'polite' }),
    chart = h('div', { class: 'laws-chart', hidden: true }),
    legend = h('div', { class: 'ft-legend laws-legend' }),
    figures = h('div', { class: 'laws-figures' }),
    about = h('div', { class: 'laws-about' }),
    tools = h('span', { class: 'ft-tools' });
  F.replace(
    root,
    h(
      'div',
      { class: 'laws' },
      h(
        'section',
        { class: 'ft-panel laws-side', 'aria-label': 'Planners' },
        h(
          'header',
          { class: 'ft-head' },
          h('h2', {}, 'Planners'),
          h('span', { class: 'sub' }, 'what a budget calls for, by fitted laws'),
        ),
        list,
        h('div', { class: 'ft-body laws-narrow' }, pick),
      ),
      h(
        'section',
        { class: 'ft-panel laws-main' },
        h('header', { class: 'ft-head' }, title, sub, tools),
        h('div', { class: 'ft-body' }, question, form, said, chart, legend, figures, about),
      ),
    ),
  );
  const plot = new F.LawPlot(chart, legend);

  /* ---- choosing ---- */
  function choose(id, quiet) {
    law = laws.find(l => l.id === id) || laws[0];
    F.query.set({ law: law.id === laws[0].id ? null : law.id });
    for (const b of list.children) b.setAttribute('aria-pressed', String(b.dataset.id === law.id));
    pick.value = law.id;
    F.text(title, law.name);
    F.text(sub, law.title);
    sub.title = law.title;
    F.text(question, law.question);
    build();
    card();
    clear();
    if (!quiet) ask();
  }
  const clear = () => {
    F.replace(said);
    F.replace(figures);
    F.replace(legend);
    chart.hidden = true;
  };

  /* ---- what it is fitted to, and what is asked ---- */
  function sources() {
    return Object.keys(ORIGIN).filter(s => (s !== 'published' || law.published) && (s !== 'points' || law.data !== 'machine'));
  }
  function build() {
    const d = draft();
    const seg = segmented(
      'Source',
      sources().map(s => [s, s === 'runs' && law.data === 'machine' ? 'This machine' : ORIGIN[s]]),
      d.source,
      s => {
        d.source = s;
        build();
        if (s !== 'points' || d.text.trim()) ask();
        else clear();
      },
    );
    const parts = [h('div', { class: 'laws-row' }, seg)];
    if (d.source === 'runs' && law.data !== 'machine') parts.push(query(d));
    if (d.source === 'points') parts.push(points(d));
    const fields = law.options.map(o => field(o, d));
    parts.push(
      h(
        'div',
        { class: 'laws-options' },
        fields,
        h('button', { type: 'submit', class: 'ft-btn primary laws-go' }, 'Predict'),
      ),
    );
    F.replace(form, parts);
  }
  function query(d) {
    const box = h('input', {
      class: 'ft-in',
      value: d.query,
      placeholder: 'all finished runs; for example data:python-docs, or 3, 7, 12',
      'aria-label': 'Which runs',
      onchange: () => (d.query = box.value),
    });
    const row = h('label', { class: 'laws-row' }, h('span', { class: 'laws-name' }, 'Runs'), box);
    if (law.data !== 'curves' || !runs.length) return row;
    const many = law.id === 'lr-annealing-scaling-law',
      choice = h(
        'select',
        {
          class: 'ft-in ft-sel laws-run',
          'aria-label': many ? 'Add a run' : 'Run',
          onchange: () => {
            if (!choice.value) return;
            box.value = d.query = many && /^[#\d,\s]+$/.test(d.query) && d.query ? `${d.query}, ${choice.value}` : choice.value;
            ask();
          },
        },
        h('option', { value: '' }, many ? 'Add a run' : 'Choose a run'),
        runs.map(r => h('option', { value: r.id }, `${r.name}${r.status === 'finished' ? '' : ', ' + r.status}`)),
      );
    return h('div', { class: 'laws-two' }, row, choice);
  }
  function points(d) {
    const need = law.columns.map(c => (c.required ? c.name : `[${c.name}]`)).join(', '),
      box = h('textarea', {
        class: 'ft-in laws-text',
        rows: 6,
        spellcheck: 'false',
        'aria-label': 'Points as CSV or JSON',
        placeholder: law.columns
          .filter(c => c.required)
          .map(c => c.name)
          .join(','),
        value: d.text,
        oninput: () => (d.text = box.value),
      }),
      file = h('input', {
        type: 'file',
        accept: '.csv,.tsv,.json,.txt',
        class: 'vh',
        tabindex: '-1',
        'aria-label': 'Points file',
        onchange: async () => {
          if (!file.files[0]) return;
          if (file.files[0].size > 5e6) return F.replace(said, note('bad', 'That file is larger than 5 MB. Give one row for each run.'));
          box.value = d.text = await file.files[0].text();
          file.value = '';
          ask();
        },
      });
    return h(
      'div',
      { class: 'laws-points' },
      box,
      h(
        'div',
        { class: 'row wrap' },
        button('Open a file', null, () => file.click()),
        file,
        h('span', { class: 'dim sm' }, `Columns: ${need}. Those in brackets may be left out. 5.3M and 1e8 are understood.`),
      ),
    );
  }
  const words = s => s.replace(/_/g, ' ').replace(/^./, c => c.toUpperCase());
  function field(o, d) {
    const id = `law-${o.name}`,
      fallback = o.default === null ? 'auto' : typeof o.default === 'number' ? F.count(o.default) : String(o.default);
    const box = o.choices.length
      ? h(
          'select',
          { class: 'ft-in ft-sel', id, onchange: () => set(o, d, box.value) },
          o.choices.map(c => h('option', { value: c }, c)),
        )
      : h('input', {
          class: 'ft-in n',
          id,
          inputmode: 'decimal',
          autocomplete: 'off',
          placeholder: fallback,
          value: d.options[o.name] ?? '',
          oninput: () => box.removeAttribute('aria-invalid'),
          onchange: () => set(o, d, box.value.trim(), true),
        });
    if (o.choices.length) box.value = d.options[o.name] ?? o.default;
    box.dataset.option = o.name;
    return h(
      'div',
      { class: 'laws-field' },
      h('label', { for: id, title: o.help }, words(o.name), o.unit && !o.name.startsWith(o.unit) ? h('span', { class: 'u' }, NB + o.unit) : null),
      box,
      h('span', { class: 'help' }, o.help),
    );
  }
  function set(o, d, value, later) {
    if (value === '') delete d.options[o.name];
    else d.options[o.name] = value;
    if (!later) ask();
  }

  /* ---- asking ---- */
  async function ask() {
    const d = draft(),
      mine = ++turn,
      asked = law;
    if (d.source === 'points' && !d.text.trim()) {
      clear();
      F.replace(said, note('info', 'Paste a table above, or open a file.'));
      return;
    }
    for (const box of form.querySelectorAll('[data-option]'))
      if (box.value !== '' && box.value !== String(law.options.find(o => o.name === box.dataset.option).default))
        d.options[box.dataset.option] = box.value;
    root.setAttribute('aria-busy', 'true');
    said.classList.add('busy');
    if (!said.firstChild) F.replace(said, h('p', { class: 'dim' }, 'Fitting …'));
    const got = await S.predict(
      { law: law.id, source: d.source, query: d.query, text: d.source === 'points' ? d.text : null, options: d.options },
      { timeout: 90000 },
    );
    if (mine !== turn || asked !== law) return;
    root.removeAttribute('aria-busy');
    said.classList.remove('busy');
    got.error ? refuse(got.error, d) : show(got, d);
  }
  function refuse(error, d) {
    clear();
    const box = error.field && form.querySelector(`[data-option="${CSS.escape(error.field)}"]`);
    if (box) {
      box.setAttribute('aria-invalid', 'true');
      F.replace(said, note('bad', sentence(error)));
      return;
    }
    if (d.source !== 'runs' || !['runs', 'points', 'here'].includes(error.field)) {
      F.replace(said, note('bad', sentence(error)));
      return;
    }
    const go = s => () => {
      d.source = s;
      build();
      ask();
    };
    F.replace(
      said,
      h(
        'div',
        { class: 'ft-empty' },
        h('h3', {}, law.data === 'machine' ? 'Not measured yet' : 'Not enough runs yet'),
        h('p', {}, sentence(error)),
        h(
          'div',
          { class: 'row wrap' },
          law.published ? button('Use the published constants', null, go('published')) : null,
          button('Show the synthetic example', null, go('example')),
        ),
      ),
    );
  }
  const cell = (key, v) =>
    v === null || v === undefined
      ? ''
      : typeof v === 'string'
        ? v
        : key === 'share' || key === 'best_share' || key === 'same_best' || ((key === 'begin' || key === 'end' || key === 'decay') && v <= 1)
          ? F.percent(v, 2)
          : key === 'step_seconds'
            ? F.fig(1e3 * v)
            : Math.abs(v) >= 1e4
              ? F.count(v)
              : Number.isInteger(v)
                ? F.whole(v)
                : F.fig(v, 4);
  function show(got, d) {
    const notes = got.warnings.map(w => note(/^Extrapolation|^One law|cannot|guess|badly|open/.test(w) ? 'warn' : 'info', w));
    F.replace(said, h('p', { class: 'laws-text-answer' }, got.text), notes);
    chart.hidden = false;
    plot.show(got.plot);
    const f = got.fitted,
      fit =
        FITTED[got.source] +
        (f.error !== null ? `, ${F.whole(f.n)} points, median error ${F.percent(f.error, 2)}` : '') +
        (f.draws ? `. Intervals: 95 % of ${F.whole(f.draws)} refits to resampled points` : '');
    const tables = [
      h(
        'section',
        {},
        h('h3', { class: 'ft-h' }, 'Constants ', h('span', { class: 'sub' }, fit)),
        h(
          'div',
          { class: 'ft-scroll' },
          F.table(
            [
              { name: 'Constant' },
              { name: 'Value', r: true, f: v => F.fig(v, 4) },
              { name: 'from', r: true, f: v => (F.finite(v) ? F.fig(v, 4) : '') },
              { name: 'to', r: true, f: v => (F.finite(v) ? F.fig(v, 4) : '') },
              { name: 'Meaning' },
            ],
            f.constants.map(c => [c.name, c.value, c.low, c.high, c.help]),
          ),
        ),
      ),
    ];
    for (const [key, name] of RANKED) {
      const rows = got.figures[key];
      if (!Array.isArray(rows) || !rows.length) continue;
      const keys = Object.keys(rows[0]).filter(k => k !== 'words' && rows.some(r => r[k] !== null));
      tables.push(
        h(
          'section',
          {},
          h('h3', { class: 'ft-h' }, name),
          h(
            'div',
            { class: 'ft-scroll' },
            F.table(
              keys.map(k => ({ name: HEADS[k] || k.replace(/_/g, ' '), r: typeof rows[0][k] !== 'string', f: v => cell(k, v) })),
              rows.map(r => keys.map(k => r[k])),
            ),
          ),
        ),
      );
    }
    F.replace(figures, tables);
    F.replace(
      tools,
      button('Copy as command', 'copy', () => F.copy(command(d), 'Command copied'), 'quiet only-wide'),
    );
  }
  const quote = s => (/^[\w.:,%-]+$/.test(s) ? s : `'${String(s).replace(/'/g, `'"'"'`)}'`);
  function command(d) {
    const out = ['python -m workbench predict', law.id];
    if (d.source === 'published' || d.source === 'example') out.push(`--${d.source}`);
    else if (d.source === 'points') out.push('--points points.csv');
    else if (d.query) out.push('--runs', quote(d.query));
    for (const [k, v] of Object.entries(d.options)) out.push(`--${k}`, quote(v));
    return out.join(' ');
  }
  function card() {
    const rows = (name, items) =>
      items.length
        ? [
            h('h4', {}, name),
            h(
              'ul',
              {},
              items.map(i => h('li', {}, i)),
            ),
          ]
        : [];
    F.replace(
      about,
      h(
        'details',
        {},
        h('summary', {}, 'How it works, what it needs, where it differs from the paper'),
        h('p', { class: 'mono laws-equation' }, law.form),
        rows('Needs', law.needs),
        rows('The paper claims', law.claims),
        rows('Differs', law.differs),
      ),
    );
  }

  /* ---- start, once the view is seen ---- */
  async function start() {
    if (started) return;
    started = true;
    const got = await S.cards({}, { retry: true });
    if (got.error) {
      F.replace(said, note('bad', sentence(got.error)));
      return;
    }
    laws = got.laws;
    runs = got.runs;
    F.replace(
      list,
      laws.map(l =>
        h(
          'button',
          { type: 'button', class: 'laws-item', 'data-id': l.id, onclick: () => choose(l.id) },
          h('b', {}, l.name),
          h('span', {}, l.question),
        ),
      ),
    );
    F.replace(
      pick,
      laws.map(l => h('option', { value: l.id }, l.name)),
    );
    const asked = F.query.get('law'),
      first = laws.find(l => l.id === asked) || laws[0],
      wanted = F.query.get('source'),
      run = F.query.get('run');
    law = first;
    if (wanted && sources().includes(wanted)) draft().source = wanted;
    if (run) draft().query = String(run);
    choose(first.id);
  }
  addEventListener('fettle-view', e => e.detail === 'laws' && start());
  if (F.query.get('view') === 'laws') start();
})();
