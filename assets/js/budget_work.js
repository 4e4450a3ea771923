/* Limits without a ruler of their own: work in steps or tokens, and energy. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, parseNumber, plain } = fettle.form;
  const { whole: count } = fettle,
    fill = fettle.replace;

  /* a limit on work has no ruler here: steps, or tokens (examples) */
  function workRow(form) {
    const box = h('input', { type: 'checkbox', class: 'ft-check' }),
      say = h('span', { class: 'say' }),
      err = h('span', { role: 'alert' });
    const input = h('input', { class: 'ft-in s n', 'aria-label': 'Limit on steps or tokens', inputmode: 'numeric' });
    const kind = h(
      'select',
      { class: 'ft-in s ft-sel nr-kind', 'aria-label': 'What is counted' },
      h('option', { value: 'steps' }, 'steps'),
      h('option', { value: 'tokens' }, 'tokens'),
    );
    const set = h('span', { class: 'set' }),
      root = h('div', { class: 'ft-limit', 'data-limit': 'work' }, h('label', null, box, 'Work'), say, set, err);
    const which = () =>
      form.get('budget.tokens') !== undefined && form.get('budget.tokens') !== null
        ? 'tokens'
        : form.get('budget.steps') !== undefined && form.get('budget.steps') !== null
          ? 'steps'
          : null;
    let last = { steps: 200, tokens: 400000 };
    const write = v => {
      const k = kind.value,
        o = k === 'steps' ? 'tokens' : 'steps';
      if (form.spec.budget[o] !== undefined) delete form.spec.budget[o];
      form.set('budget.' + k, v);
    };
    root.paint = () => {
      const k = which(),
        f = form.forecast,
        task = (form.profile || {}).task,
        typed = 'budget.work' in form.typed;
      box.checked = !!k;
      root.classList.toggle('off', !k);
      if (k) kind.value = k;
      if (set.dataset.on !== String(!!k)) {
        set.dataset.on = String(!!k);
        fill(set, ...(k ? ['at most', input, kind] : ['no limit']));
      }
      if (k && document.activeElement !== input) {
        input.value = typed ? form.typed['budget.work'] : count(form.get('budget.' + k));
        input.style.width = Math.max(62, input.value.length * 7 + 14) + 'px';
      }
      kind.lastChild.textContent = f && f.units === 'examples' ? 'examples' : 'tokens';
      fill(
        say,
        f && f.steps
          ? [h('b', { class: 'num' }, count(f.steps)), ` steps, ${fettle.count(f.tokens)} ${f.units || 'tokens'}`]
          : f
            ? 'no training steps'
            : '',
      );
    };
    const read = () => {
      const v = parseNumber(input.value);
      if (!(v > 0) || v !== Math.round(v))
        return form.wrong(
          'budget.work',
          input.value,
          'Not a whole number above zero. Give for example 200, or clear the box for no limit.',
        );
      form.clear('budget.work');
      last[kind.value] = v;
      write(v);
    };
    input.addEventListener('input', read);
    kind.addEventListener('change', () => {
      write(last[kind.value]);
      root.paint();
    });
    box.addEventListener('change', () => {
      form.clear('budget.work');
      if (box.checked) {
        const s = form.forecast && form.forecast.steps;
        if (s) last.steps = s;
        write(last[kind.value]);
      } else {
        delete form.spec.budget.steps;
        form.set('budget.tokens', undefined);
      }
      root.paint();
    });
    form.bindError('budget.work', input, err);
    for (const k of ['steps', 'tokens']) {
      const e = h('span', { role: 'alert' });
      root.append(e);
      form.bindError('budget.' + k, input, e);
    }
    return root;
  }

  function energyRow(form) {
    const box = h('input', { type: 'checkbox', class: 'ft-check' }),
      say = h('span', { class: 'say' }),
      set = h('span', { class: 'set' }),
      err = h('span', { role: 'alert' });
    const input = h('input', { class: 'ft-in s n', 'aria-label': 'Energy limit in joules', inputmode: 'numeric' });
    const root = h('div', { class: 'ft-limit off', 'data-limit': 'joules' }, h('label', null, box, 'Energy'), say, set, err);
    root.paint = () => {
      const has = !!(form.boot.machine || {}).energy,
        v = form.get('budget.joules'),
        lim = ((form.forecast || {}).limits || {}).joules;
      box.disabled = !has && !v;
      box.checked = !!v;
      root.classList.toggle('off', !v);
      fill(
        say,
        v ? (lim && lim.reason) || 'metered while it runs' : has ? 'metered while it runs' : 'No energy counter on this machine',
      );
      if (set.dataset.on !== String(!!v)) {
        set.dataset.on = String(!!v);
        fill(set, ...(v ? ['at most', input, 'J'] : has ? ['no limit'] : []));
      }
      if (v && document.activeElement !== input) input.value = form.typed['budget.joules'] || plain(v);
    };
    input.addEventListener('input', () => {
      const v = parseNumber(input.value);
      if (v > 0) form.set('budget.joules', v);
      else
        form.wrong(
          'budget.joules',
          input.value,
          'Not a number above zero. Give for example 5000 J, or clear the box for no limit.',
        );
    });
    box.addEventListener('change', () => {
      form.set('budget.joules', box.checked ? 5000 : undefined);
      root.paint();
    });
    form.bindError('budget.joules', input, err);
    return root;
  }

  fettle.parts.moreLimits = form => [workRow(form), energyRow(form)];
})();
