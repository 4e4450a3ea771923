/* Probe: two real steps and an evaluation batch instead of the forecast. A button, the words of its progress, what it found. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, button, sentence, NB } = fettle.form,
    { icon, text } = fettle,
    fill = fettle.replace;
  const EVERY = 400;

  fettle.parts.probe = function (form) {
    const start = button('Probe', null, () => begin(), 'nr-probe-go'),
      cancel = button('Cancel', null, () => end(), 'quiet nr-probe-end'),
      words = h('span', { class: 'sm mut grow', role: 'status' }),
      bar = h('span', { class: 'nr-probe-bar', 'aria-hidden': 'true' }, h('i')),
      found = h('div', { class: 'nr-probe-found' }),
      root = h('div', { class: 'nr-probe' }, h('div', { class: 'row' }, start, cancel, words), bar, found);
    start.title = 'Two real training steps on the longest batch and one evaluation batch, a minute at the most';
    let on = false,
      said = '',
      shown = '';

    const busy = state => {
      on = true;
      start.hidden = true;
      cancel.hidden = bar.hidden = false;
      bar.firstChild.style.width = `${Math.round(100 * (state.share || 0))}%`;
      text(words, `${state.text[0].toUpperCase()}${state.text.slice(1)}, ${Math.round(state.seconds)}${NB}s`);
    };
    const idle = line => {
      on = false;
      start.hidden = false;
      cancel.hidden = bar.hidden = true;
      said = line || '';
      paint();
    };
    const follow = async () => {
      const state = await form.server.probe_state({});
      if (state.lost) return setTimeout(follow, 2000);
      if (state.error) return idle(sentence(state.error));
      if (state.running) {
        busy(state);
        return setTimeout(follow, EVERY);
      }
      idle(state.problem);
      form.plan();
    };
    const begin = async () => {
      if (on || form.blocked) return;
      busy({ text: 'starting', share: 0, seconds: 0 });
      const state = await form.server.probe({ spec: form.spec });
      if (state.error) return idle(sentence(state.error));
      follow();
    };
    const end = async () => {
      cancel.disabled = true;
      await form.server.probe_cancel({});
      cancel.disabled = false;
    };
    const use = change => {
      for (const [path, value] of Object.entries(change.patch)) form.set(path, value, 'patch');
      form.tell('all');
      form.tell('pipeline');
    };
    const paint = () => {
      if (on) return;
      const p = form.forecast && form.forecast.probe;
      start.disabled = !form.forecast || Boolean(form.blocked);
      text(start.querySelector('.lab'), p ? 'Probe again' : 'Probe');
      text(words, said || (p ? '' : 'Measures instead of forecasting: a minute at the most'));
      words.classList.toggle('nr-err', Boolean(said));
      const key = JSON.stringify(p || null);
      if (key === shown) return;
      shown = key;
      if (!p) return fill(found);
      if (p.failed)
        return fill(
          found,
          h(
            'div',
            { class: 'ft-note bad' },
            icon('i-cross'),
            h('span', { class: 'grow' }, p.text),
            Object.keys(p.change.patch).length ? button('Use it', null, () => use(p.change), 'nr-use') : null,
          ),
        );
      fill(
        found,
        h(
          'div',
          { class: 'ft-note' },
          icon('i-check'),
          h(
            'span',
            { class: 'grow' },
            h('b', null, 'Probed: '),
            `${p.measured}. `,
            h('span', { class: 'mut' }, `The figures above are ${p.text}.`),
            ...p.missing.map(m => h('span', { class: 'mut' }, ` Not measured: ${m}.`)),
          ),
        ),
      );
    };
    form.on('forecast', () => {
      if (form.forecast && said && !on) said = '';
      paint();
    });
    form.on('errors', paint);
    form.on('change', () => {
      said = '';
    });
    idle('');
    // A probe that was under way when the page was loaded again is followed further.
    form.server.probe_state({}).then(state => {
      if (state.running && !on) {
        busy(state);
        follow();
      }
    });
    return root;
  };
})();
