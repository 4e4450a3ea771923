/* The cards of the Library: what a method does, needs and cannot, what a model or a data set is and how it is made again. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, words, dtype, architecture, note, figure } = fettle.form,
    parts = fettle.parts;
  const { whole: count, size: bytes, sizeParts, num, icon, family: familyIcon } = fettle;
  const LIMIT = { trainable: 'trainable', size_mb: 'size', memory_gb: 'memory', minutes: 'minutes', joules: 'energy' };
  const ARCHITECTURES = [
    ['llama', 'causal-lm'],
    ['gpt2', 'causal-lm'],
    ['bert', 'text-classification'],
    ['vit', 'image-classification'],
  ];
  const tag = t => h('span', { class: 'ft-tag' }, t);
  const kv = rows =>
    h(
      'dl',
      { class: 'ft-kv' },
      ...rows
        .filter(r => r && r[1] !== null && r[1] !== undefined && r[1] !== '')
        .flatMap(([k, v]) => [h('dt', null, k), h('dd', { class: 'num' }, v)]),
    );
  const list = a => (a && a.length ? a.join('; ') : '');
  const panelOf = (title, sub, glyph, tools, ...body) =>
    h(
      'section',
      { class: 'ft-panel', 'aria-labelledby': 'h-d' },
      h(
        'header',
        { class: 'ft-head lib-head' },
        glyph,
        h('h2', { id: 'h-d' }, title),
        h('span', { class: 'sub', title: sub }, sub),
        h('span', { class: 'ft-tools' }, ...tools),
      ),
      h('div', { class: 'ft-body' }, ...body),
    );
  const command = text =>
    h(
      'div',
      { class: 'lib-cmd' },
      h('code', { class: 'ft-code', tabindex: 0 }, text),
      h(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon',
          'aria-label': 'Copy this command',
          title: 'Copy this command',
          onclick: () => fettle.copy(text, 'Command copied'),
        },
        icon('i-copy'),
      ),
    );
  const use = (key, id, cls = 'primary lib-use') =>
    h('a', { class: 'ft-btn ' + cls, href: `/?${key}=${encodeURIComponent(id)}` }, icon('i-plus'), h('span', null, 'Use in a run'));

  const SAY = 5;
  /* few methods by name, many by their number and the first of them */
  const names = (ms, kind) =>
    ms.length <= SAY
      ? ms.map(m => m.name).join(', ')
      : `any of ${ms.length} methods that ${kind}, such as ${ms
          .slice(0, SAY - 2)
          .map(m => m.name)
          .join(', ')}`;
  const order = (m, all) => {
    if (m.family === 'switch') return [['Goes with', 'any stage that trains: it is switched on in the training, not put into the pipeline']];
    const M = all.filter(x => x.id !== m.id && x.family !== 'switch'),
      packs = M.filter(x => x.packs),
      trains = M.filter(x => x.trains && !x.packs),
      prunes = M.filter(x => !x.trains && !x.packs);
    if (m.packs)
      return [
        ['Goes after', names([...prunes, ...trains], 'prune or train')],
        ['Not after', packs.length ? names(packs, 'pack') + ': the weights are already packed' : ''],
        ['Not before', 'any other stage: packed weights can be neither trained nor changed'],
      ];
    const keeps = m.masks ? ' (its zeros are kept)' : '';
    return [
      m.trains
        ? ['Goes after', prunes.length ? names(prunes, 'prune') + (prunes.some(x => x.masks) ? ' (masks are kept)' : '') : '']
        : ['Goes before', trains.length ? names(trains, 'train') + keeps : ''],
      ['Goes before', packs.length ? names(packs, 'pack') : ''],
      ['Not after', packs.length ? names(packs, 'pack') + ': the weights are already packed' : ''],
    ];
  };
  const merged = rows => {
    const out = [];
    for (const [k, v] of rows) {
      if (!v) continue;
      const same = out.find(r => r[0] === k);
      if (same) same[1] += ', ' + v;
      else out.push([k, v]);
    }
    return out;
  };
  const methodCard = (m, all) => {
    const facts = [
      ['Needs', list(m.needs)],
      ['Cannot', list(m.cannot)],
      ...merged(order(m, all)),
      [
        'Leaves',
        [
          m.trains ? 'trained weights' : '',
          m.masks ? 'zeros that later stages keep' : '',
          m.shrinks ? 'smaller tensors' : '',
          m.packs ? 'packed integers' : '',
        ]
          .filter(Boolean)
          .join(', '),
      ],
      ['Tasks', (m.tasks || []).join(', ')],
    ].filter(([, v]) => v);
    const hy = h(
      'table',
      { class: 'ft-table lib-hyper' },
      h('thead', null, h('tr', null, ...['Field', 'Range', 'Default', 'Lever'].map(t => h('th', { scope: 'col' }, t)))),
      h(
        'tbody',
        null,
        ...m.hyperparameters.map(f =>
          h(
            'tr',
            null,
            h('td', null, h('span', { class: 'mono' }, f.name), h('span', { class: 'mi dim lib-help' }, f.help)),
            h(
              'td',
              { class: 'num wrap' },
              parts.fieldRange({ low: null, high: null, choices: null, ...f }) ||
                (typeof f.default === 'boolean' ? 'on, off' : f.type === 'str' ? 'text' : 'any'),
            ),
            h(
              'td',
              { class: 'num' },
              f.default === true
                ? 'on'
                : f.default === false
                  ? 'off'
                  : f.default === '' || f.default === null
                    ? 'none'
                    : parts.fieldShow(f, f.default),
            ),
            h(
              'td',
              null,
              LIMIT[f.lever]
                ? h(
                    'span',
                    { class: 'ft-tag lever', title: `On auto it moves to obey the ${LIMIT[f.lever]} limit` },
                    '↕ ' + LIMIT[f.lever],
                  )
                : '',
            ),
          ),
        ),
      ),
    );
    const arch = h(
      'ul',
      { class: 'lib-arch' },
      ...ARCHITECTURES.map(([a, task]) => {
        const no = (m.refuses || {})[a] || (m.tasks && !m.tasks.includes(task) ? `${task} is not served` : '');
        return h(
          'li',
          { class: no ? 'dim' : '' },
          h('span', { class: 'ft-verdict plain', 'data-v': no ? 'na' : 'yes' }, icon(no ? 'i-na' : 'i-check')),
          h('span', null, architecture(a), no ? `: ${no}` : '', no ? null : h('span', { class: 'vh' }, ' is served')),
        );
      }),
      ...Object.entries(m.refuses || {})
        .filter(([a]) => !ARCHITECTURES.some(([x]) => x === a))
        .map(([a, no]) =>
          h(
            'li',
            { class: 'dim' },
            h('span', { class: 'ft-verdict plain', 'data-v': 'na' }, icon('i-na')),
            h('span', null, `${architecture(a)}: ${no}`),
          ),
        ),
    );
    return panelOf(
      m.name,
      m.title + (m.year ? `, ${m.year}` : ''),
      familyIcon(m.family),
      [use('method', m.id)],
      h(
        'div',
        { class: 'ft-method' },
        h(
          'div',
          null,
          h('p', { class: 'does' }, m.summary),
          h('dl', { class: 'ft-why lib-why' }, ...facts.flatMap(([k, v]) => [h('dt', null, k), h('dd', null, v)])),
          m.differs ? h('div', { class: 'lib-differs' }, note('info', h('b', null, 'Where this differs. '), m.differs)) : null,
        ),
        h(
          'div',
          null,
          h('p', { class: 'ft-h' }, 'Hyperparameters ', h('span', { class: 'sub num' }, String(m.hyperparameters.length))),
          m.hyperparameters.length
            ? h('div', { class: 'ft-scroll' }, hy)
            : h('p', { class: 'sm dim' }, 'None: there is nothing to choose.'),
          h(
            'p',
            { class: 'ft-h lib-gap' },
            'Architectures ',
            h('span', { class: 'sub' }, 'among those that the contract tests run'),
          ),
          arch,
        ),
      ),
    );
  };
  const figures = card => Object.entries(card.figures || {}).map(([k, v]) => [words(k), figure(v)]);
  const madeBy = card =>
    card.command
      ? h(
          'div',
          { class: 'lib-made' },
          h('p', { class: 'ft-h' }, 'Made again with'),
          command(Array.isArray(card.command) ? card.command.join(' ') : card.command),
        )
      : null;
  const modelCard = p => {
    const card = p.card || {},
      by = p.bytes_by_dtype || {},
      top = Math.max(...Object.values(by), 1),
      f = figures(card);
    return panelOf(
      p.id,
      [p.title !== p.id ? p.title : '', architecture(p.architecture), p.task].filter(Boolean).join(', '),
      icon('f-full'),
      [tag('Bundled model'), use('model', p.id)],
      h(
        'div',
        { class: 'ft-method' },
        h(
          'div',
          null,
          card.text || card.summary || card.description
            ? h('p', { class: 'does lib-text' }, card.text || card.summary || card.description)
            : f.length || card.command
              ? null
              : h('p', { class: 'dim' }, 'This model has no card.'),
          f.length ? [h('p', { class: 'ft-h' }, 'Figures'), kv(f)] : null,
          madeBy(card),
        ),
        h(
          'div',
          null,
          h('p', { class: 'ft-h' }, 'Shape'),
          kv([
            ['Parameters', count(p.parameters)],
            ['Layers', count(p.layers)],
            ['Hidden', count(p.hidden)],
            ['Heads', p.heads ? `${p.heads} × ${Math.round(p.hidden / p.heads)}` : null],
            ['MLP', p.mlp ? count(p.mlp) : null],
            ['Vocabulary', p.task !== 'image-classification' && p.vocab ? count(p.vocab) : null],
            ['Labels', p.task !== 'causal-lm' && p.labels ? count(p.labels) : null],
            ['Context', p.context ? count(p.context) + (p.task === 'image-classification' ? ' patches' : ' tokens') : null],
            ['Stored', `${dtype(p.dtype)} safetensors, ${bytes(p.size_bytes)}`],
          ]),
          h('p', { class: 'ft-h lib-gap' }, 'Weights by precision'),
          h(
            'div',
            { class: 'ft-bars' },
            ...Object.entries(by).flatMap(([k, v]) => [
              h('span', { class: 'mut' }, k),
              h('span', { class: 't', 'aria-hidden': 'true' }, h('i', { vars: { v: v / top } })),
              num(...sizeParts(v), 'num r'),
            ]),
          ),
        ),
      ),
    );
  };
  const dataCard = d => {
    const card = d.card || {},
      f = figures(card),
      known = ['title', 'task', 'text', 'figures', 'command', 'source', 'license', 'licence'];
    return panelOf(
      d.id,
      d.title,
      icon('i-table'),
      [tag('Bundled data'), use('data', d.id)],
      h(
        'div',
        { class: 'ft-method' },
        h(
          'div',
          null,
          card.text ? h('p', { class: 'does' }, card.text) : null,
          card.error || d.error ? note('warn', card.error || d.error) : null,
          card.command
            ? madeBy(card)
            : h(
                'div',
                { class: 'lib-made' },
                h('p', { class: 'ft-h' }, 'On the command line'),
                command(`python -m workbench data ${d.id}`),
              ),
        ),
        h(
          'div',
          null,
          kv([
            ['Task', d.task],
            ['Train', count(d.train)],
            ['Evaluation', count(d.evaluation)],
            ['Labels', d.labels ? count(d.labels) : null],
            ['Source', card.source],
            ['Licence', card.license || card.licence],
            ...f,
            ...Object.entries(card)
              .filter(([k, v]) => !known.includes(k) && (typeof v === 'string' || typeof v === 'number'))
              .map(([k, v]) => [words(k), figure(v)]),
          ]),
        ),
      ),
    );
  };

  fettle.parts.cards = { methodCard, modelCard, dataCard, command, use, LIMIT };
})();
