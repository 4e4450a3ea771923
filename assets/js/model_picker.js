/* Which model: bundled, a local folder, or a hub id; and its profile from shapes alone. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, segmented, button, sentence, dtype, architecture } = fettle.form;
  const { whole: count, sizeParts, countParts, num } = fettle,
    fill = fettle.replace;
  const PRECISION = [
    ['fp32', 'fp32'],
    ['bf16', 'bf16'],
    ['int8', 'int8'],
    ['int4', 'int4'],
  ];

  fettle.parts.modelPicker = function (form, panel) {
    const body = panel.querySelector('.ft-body'),
      tools = panel.querySelector('.ft-tools');
    const pick = h('div', { class: 'nr-pickbox' }),
      facts = h('div', { class: 'nr-facts' }),
      err = h('p', { role: 'alert' });
    fill(body, pick, err, facts);
    let where = 'bundled',
      asked = '';
    // what was typed under each source, so that switching loses nothing
    const kept = () => (form.view.model = form.view.model || {});
    const of = m => (form.boot.models.some(x => x.id === m) ? 'bundled' : /^[~./]|^[A-Za-z]:\\/.test(m) ? 'folder' : 'hub');
    const seg = segmented(
      'Where the model comes from',
      [
        ['bundled', 'Bundled'],
        ['folder', 'Folder'],
        ['hub', 'Hub'],
      ],
      where,
      v => {
        where = v;
        build(true);
      },
    );
    fill(tools, seg);

    const choose = id => {
      kept()[where] = id;
      form.set('model', id);
      form.tell('model');
      form.pair('model');
    };
    const typed = (label, placeholder, help) => {
      const input = h('input', {
        class: 'ft-in',
        'aria-label': label,
        placeholder,
        value: kept()[where] || '',
        spellcheck: 'false',
        autocomplete: 'off',
      });
      const read = () => {
        const t = input.value.trim();
        kept()[where] = input.value;
        form.save();
        if (!t) {
          form.wrong(
            'model',
            input.value,
            where === 'hub'
              ? 'No hub id yet. Give one such as HuggingFaceTB/SmolLM2-135M.'
              : 'No folder yet. Give one that holds config.json and *.safetensors.',
          );
          return;
        }
        choose(t);
      };
      input.addEventListener('change', read);
      input.addEventListener('keydown', e => {
        if (e.key === 'Enter') {
          e.preventDefault();
          read();
        }
      });
      input.addEventListener('input', () => {
        kept()[where] = input.value;
        form.save();
      });
      form.bindError('model', input, err);
      return h(
        'div',
        { class: 'nr-source' },
        h('div', { class: 'row' }, input, button('Read', null, read)),
        where === 'hub' ? fettle.parts.hubSearch(form, input, 'model', choose) : null,
        h('p', { class: 'mi dim' }, help),
      );
    };
    const build = focus => {
      seg.set(where);
      if (where === 'bundled') {
        const list = h(
          'div',
          { class: 'ft-pick', role: 'radiogroup', 'aria-label': 'Bundled models' },
          ...form.boot.models.map(m => {
            const r = h('input', {
              type: 'radio',
              name: 'nr-model',
              value: m.id,
              checked: m.id === form.spec.model,
              onchange: () => choose(m.id),
            });
            return h(
              'label',
              null,
              r,
              h(
                'span',
                null,
                h('b', null, m.id),
                ' ',
                h('span', { class: 'dim' }, [architecture(m.architecture), m.task].filter(Boolean).join(', ')),
              ),
              num(...countParts(m.parameters), 'num mut'),
            );
          }),
        );
        fill(
          pick,
          form.boot.models.length
            ? list
            : h('p', { class: 'sm dim' }, 'No model is bundled with this copy. Give a folder or a hub id.'),
        );
        if (of(form.spec.model) === 'bundled') {
          err.hidden = !form.errors.model;
          form.bindError('model', list, err);
        } else err.hidden = true;
      } else
        fill(
          pick,
          where === 'folder'
            ? typed('Folder of the model', '/path/to/model', 'On the machine that runs Fettle: config.json and *.safetensors.')
            : typed(
                'Hub id of the model',
                'owner/name, or words to search for',
                'Only config.json and the header of the weights are read until the run starts.',
              ),
        );
      if (focus) {
        const i = pick.querySelector('input:checked, input');
        if (i) i.focus({ preventScroll: true });
      }
    };
    const kv = rows =>
      h(
        'dl',
        { class: 'ft-kv' },
        ...rows
          .filter(([, v]) => v !== undefined && v !== null && v !== '' && v !== 0)
          .flatMap(([k, v]) => [h('dt', null, k), h('dd', { class: 'num' }, v)]),
      );
    const show = () => {
      const p = form.profile;
      if (!p) {
        fill(facts, form.spec && !form.errors.model ? h('p', { class: 'sm dim' }, 'Reading shapes…') : null);
        return;
      }
      const lm = p.task === 'causal-lm' || p.task === 'text-classification';
      const by = p.bytes_by_dtype || {},
        top = Math.max(...Object.values(by), 1),
        stored = dtype(p.dtype),
        card = p.card || {};
      const dim = p.heads ? `${p.heads} × ${p.head_dim || Math.round(p.hidden / p.heads)}` : null;
      fill(
        facts,
        h(
          'div',
          { class: 'nr-two' },
          kv([
            ['Layers', p.layers && count(p.layers)],
            ['Hidden', p.hidden && count(p.hidden)],
            ['Heads', dim],
          ]),
          kv([
            ['MLP', p.mlp && count(p.mlp)],
            ['Vocabulary', lm && p.vocab ? count(p.vocab) : null],
            ['Labels', p.task !== 'causal-lm' && p.labels ? count(p.labels) : null],
            ['Context', p.context ? [count(p.context), h('span', { class: 'u' }, lm ? ' tokens' : ' patches')] : null],
          ]),
        ),
        h(
          'div',
          null,
          h(
            'p',
            { class: 'ft-h' },
            'Weights by precision ',
            h('span', { class: 'sub num' }, `${count(p.parameters)} parameters`),
          ),
          h(
            'div',
            { class: 'ft-bars' },
            ...PRECISION.filter(([k]) => by[k]).flatMap(([k, t]) => [
              h('span', { class: 'mut' }, t + (t === stored ? ', stored' : '')),
              h('span', { class: 't', 'aria-hidden': 'true' }, h('i', { vars: { v: by[k] / top } })),
              num(...sizeParts(by[k]), 'num r'),
            ]),
          ),
        ),
        cardLine(p, card),
      );
    };
    const cardLine = (p, card) => {
      const link = h('a', { href: '/library?model=' + encodeURIComponent(p.id || form.spec.model) }, 'Card and spec');
      const text = card.line || card.summary || card.text;
      const [name, first] = Object.entries(card.figures || {})[0] || [];
      const metric = fettle.form.figure(first);
      if (!text && !metric)
        return p.has_weights === false
          ? h('p', { class: 'sm warn' }, 'No weights in this folder: training would start from random ones.')
          : null;
      return h(
        'p',
        { class: 'sm mut' },
        text ? String(text).replace(/\.$/, '') : '',
        text && metric ? '. ' : '',
        metric ? [fettle.form.words(name), ' ', h('b', { class: 'num ink' }, metric)] : null,
        '. ',
        of(form.spec.model) === 'bundled' ? link : null,
      );
    };
    const load = async () => {
      const m = form.spec.model,
        d = form.spec.data;
      if (asked === m && form.profile) return;
      asked = m;
      form.profile = null;
      show();
      const got = await form.server.profile({ source: m });
      if (asked !== m) return;
      if (got.error) {
        form.errors.model = sentence(got.error);
        form.profile = null;
        asked = '';
        form.tell('errors');
        fill(facts);
        form.tell('profile');
        return;
      }
      form.profile = got;
      show();
      form.tell('profile');
    };
    form.on('all', () => {
      where = of(form.spec.model || '');
      if (where !== 'bundled') kept()[where] = form.spec.model;
      asked = form.profile && asked === form.spec.model ? asked : '';
      build(pick.contains(document.activeElement));
      load();
    });
    form.on('model', load);
  };
})();
