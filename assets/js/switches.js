/* What is switched on in the training loop beside any stage that trains: a check box for each, its settings when it is on. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h } = fettle.form,
    { setting } = fettle.parts,
    PATH = 'training.switches';

  /* the element; rows are its settings, to be updated with each forecast */
  fettle.parts.switches = form => {
    const box = h('div', { class: 'nr-switches' });
    const on = () => form.get(PATH) || [];
    const put = list => {
      for (const bag of [form.typed, form.errors]) for (const k of Object.keys(bag)) if (k.startsWith(PATH + '.')) delete bag[k];
      form.set(PATH, list.length ? list : undefined);
      box.build();
    };
    box.rows = [];
    box.build = () => {
      box.rows = [];
      fettle.replace(
        box,
        form.boot.switches.map(m => {
          const at = on().findIndex(s => s.method === m.id),
            id = 'switch-' + m.id;
          const check = h('input', {
            type: 'checkbox',
            class: 'ft-check',
            id,
            checked: at >= 0,
            'aria-describedby': id + '-says',
            onchange: () => {
              put(check.checked ? [...on(), form.complete({ method: m.id })] : on().filter(s => s.method !== m.id));
              document.getElementById(id)?.focus();
            },
          });
          const rows = at < 0 ? [] : m.hyperparameters.map(f => setting(form, f, `${PATH}.${at}.${f.name}`, () => null));
          box.rows.push(...rows);
          return h(
            'div',
            { class: 'nr-switch' + (at < 0 ? '' : ' on'), 'data-switch': m.id },
            h(
              'div',
              { class: 'row' },
              check,
              h('label', { for: id }, h('b', null, m.name)),
              h('a', { class: 'sm', href: '/library?method=' + encodeURIComponent(m.id) }, 'Card'),
            ),
            h('p', { class: 'sm mut', id: id + '-says' }, m.summary),
            rows.length ? h('div', { class: 'nr-sets' }, ...rows) : null,
          );
        }),
      );
    };
    return box;
  };
})();
