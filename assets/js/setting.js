/* One hyperparameter as a field: label, lever, auto switch, control, help, and the sentence when a value is refused. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, NB, words, parseNumber, plain } = fettle.form;
  const { whole: count, percent } = fettle;
  const LIMIT = { trainable: 'trainable', size_mb: 'size', memory_gb: 'memory', minutes: 'minutes', joules: 'energy' };
  const asShare = f => ['%', 'share', 'fraction'].includes(f.unit) || /sparsity|density|dropout|^warmup$|^final$/.test(f.name);

  /* what a field shows for a value, and what a text means for it */
  function show(f, v) {
    if (v === null || v === undefined) return '';
    if (f.whole) return count(v);
    if (typeof v === 'number' && asShare(f) && v <= 1)
      return percent(v, 4)
        .replace(/\.0+(?=\D)/, '')
        .replace(/(\.\d*?)0+(?=\D)/, '$1');
    return plain(v);
  }
  function read(f, text) {
    const t = text.trim();
    if (f.type === 'str' || (f.type === 'auto' && f.choices === null && f.text)) return t;
    let v = parseNumber(t);
    if (asShare(f) && v > 1 && f.high !== null && f.high <= 1 && v <= 100) v /= 100; // "50" in a field of shares is 50 %
    return v;
  }
  function range(f) {
    if (f.choices) return f.choices.map(c => words0(c)).join(', ');
    const say = v => (v === null || v === undefined ? null : Number.isInteger(v) && v >= 1000 && v < 1e9 ? count(v) : show(f, v)),
      lo = say(f.low),
      hi = say(f.high);
    const unit = f.unit && !asShare(f) ? NB + f.unit : '';
    return lo !== null && hi !== null
      ? `${lo} to ${hi}${unit}`
      : lo !== null
        ? `at least ${lo}${unit}`
        : hi !== null
          ? `at most ${hi}${unit}`
          : unit.trim();
  }
  const words0 = c => (c === true ? 'on' : c === false ? 'off' : String(c));
  const label = f => f.label || words({ lr: 'learning rate', lr_scale: 'learning rate scale' }[f.name] || f.name);
  const isWhole = f => f.type === 'int' || (f.type === 'auto' && Number.isInteger(f.low)) || f.whole;
  function refuse(f, v, text) {
    const r = range(f);
    if (f.type === 'str') return text ? '' : 'Empty. Give a text.';
    if (Number.isNaN(v))
      return `“${text}” is not a number. Give ${r || `for example ${show(f, f.default)}`}${f.auto ? ', or use auto' : ''}.`;
    if (isWhole(f) && !Number.isInteger(v)) return `${plain(v)} is not a whole number. Give ${r}.`;
    if ((f.low !== null && f.low !== undefined && v < f.low) || (f.high !== null && f.high !== undefined && v > f.high))
      return `${show(f, v)} is outside ${r}. Choose inside it.`;
    return '';
  }

  /* one setting: label, lever, auto switch, control, help and the sentence when it is refused.
   resolved() gives the planner's value and reason while it is on auto. */
  function setting(form, f, path, resolved) {
    f = { low: null, high: null, choices: null, ...f, auto: !!f.lever || f.auto || f.default === 'auto' };
    const id = 'f' + path.replace(/\./g, '-'),
      get = () => form.get(path);
    const value = () => {
      const v = get();
      return v === undefined ? f.default : v;
    };
    let control, paint;
    const auto =
      f.auto && !(f.choices || []).includes('auto')
        ? h('button', { type: 'button', class: 'ft-tag nr-auto', 'aria-label': `${label(f)}: automatic` }, 'auto')
        : null;
    const isAuto = () => auto && value() === 'auto';
    const line = h('span', { role: 'alert' });
    const kind =
      typeof f.default === 'boolean' || (f.choices && f.choices.every(c => typeof c === 'boolean'))
        ? 'check'
        : f.choices
          ? 'select'
          : 'text';
    if (kind === 'check') {
      control = h('input', { type: 'checkbox', class: 'ft-check', id, onchange: () => form.set(path, control.checked) });
      paint = () => {
        control.checked = isAuto() ? !!(resolved() || {}).value : !!value();
      };
    } else if (kind === 'select') {
      control = h(
        'select',
        { class: 'ft-in s ft-sel', id, onchange: () => form.set(path, f.choices[control.selectedIndex]) },
        ...f.choices.map(c => h('option', null, words0(c))),
      );
      paint = () => {
        control.selectedIndex = f.choices.findIndex(c => c === (isAuto() ? (resolved() || {}).value : value()));
      };
    } else {
      control = h('input', {
        class: 'ft-in s n',
        id,
        autocomplete: 'off',
        spellcheck: 'false',
        inputmode: f.type === 'str' ? undefined : 'decimal',
      });
      control.addEventListener('input', () => {
        const t = control.value.trim();
        if (auto && (t === 'auto' || t === '')) {
          delete form.typed[path];
          form.set(path, 'auto');
          return;
        }
        const v = read(f, t),
          no = refuse(f, v, t);
        if (no) form.wrong(path, control.value, no);
        else form.set(path, v);
      });
      control.addEventListener('keydown', e => {
        if (e.key === 'Enter') control.blur();
      });
      control.addEventListener('blur', () => paint());
      paint = () => {
        if (document.activeElement === control) return;
        if (path in form.typed) {
          control.value = form.typed[path];
          return;
        }
        const r = resolved() || {};
        control.value = isAuto() ? (r.value === undefined || r.value === 'auto' ? 'auto' : show(f, r.value)) : show(f, value());
        control.style.width = Math.min(120, Math.max(f.type === 'str' ? 90 : 56, control.value.length * 7.2 + 16)) + 'px';
      };
    }
    const limit = LIMIT[f.lever];
    const lever = limit
      ? h('span', { class: 'ft-tag lever', title: `Lever: on auto this field moves to obey the ${limit} limit` }, '↕ ' + limit)
      : null;
    const why = h('span', { class: 'why' });
    const d = typeof f.default === 'boolean' ? words0(f.default) : f.default;
    const usual = d === '' ? 'empty' : d === 'auto' ? d : show(f, d);
    const help = h(
      'span',
      { class: 'help', id: id + 'h' },
      f.help ? f.help.replace(/\.$/, '') + '. ' : '',
      range(f) ? words(range(f)) + ', ' : '',
      `default ${usual}.`,
    );
    control.setAttribute('aria-description', help.textContent);
    form.bindError(path, control, line);
    const row = h(
      'div',
      { class: 'nr-set', 'data-field': f.name, 'data-path': path },
      h('label', { for: id, title: help.textContent }, label(f), lever),
      h('span', { class: 'v' }, auto, control),
      why,
      line,
      help,
    );
    const update = () => {
      if (auto) {
        auto.setAttribute('aria-pressed', String(!!isAuto()));
        auto.classList.toggle('auto', !!isAuto());
        row.classList.toggle('is-auto', !!isAuto());
      }
      paint();
      const r = resolved() || {};
      why.textContent = isAuto() && r.why ? r.why : '';
      why.hidden = !why.textContent;
    };
    if (auto)
      auto.addEventListener('click', () => {
        if (isAuto()) {
          const r = resolved() || {},
            d = f.default !== 'auto' ? f.default : f.low !== null ? f.low : 1;
          form.set(path, r.value === undefined || r.value === 'auto' || r.value === null ? d : r.value);
        } else form.set(path, 'auto');
        update();
      });
    row.update = update;
    update();
    return row;
  }

  Object.assign(fettle.parts, { setting, fieldRange: range, fieldShow: show, fieldLabel: label });
})();
