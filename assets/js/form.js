/* What the form pages add to the shared library: elements with live properties, buttons, fields that understand what
   people type, and refusals as one sentence. Read by new_run and library; fettle.js is there already. */
if (!fettle.form)
  fettle.form = (() => {
    'use strict';
    const F = fettle,
      NB = F.NB;
    /* h('input', {class: 'x', value: 3, onclick: f, vars: {v: .5}}, 'text', node): like fettle.el, but value, checked and
     disabled are set as properties and custom properties are written as names */
    const h = (tag, props, ...children) => {
      const { vars, value, checked, disabled, ...rest } = props || {};
      const e = F.el(tag, rest, ...children);
      for (const [n, x] of Object.entries(vars || {})) e.style.setProperty('--' + n, x);
      for (const [k, v] of Object.entries({ value, checked, disabled })) if (v !== undefined) e[k] = v;
      return e;
    };
    const FAMILY = {
      adaptation: 'Adaptation',
      pruning: 'Pruning',
      quantization: 'Quantization',
      kv_cache: 'KV cache',
      distillation: 'Distillation',
      switch: 'Training switch',
    };
    const words = s => {
      s = String(s).replace(/[_-]+/g, ' ').trim();
      return s ? s[0].toUpperCase() + s.slice(1) : s;
    };
    const familyName = f => FAMILY[f] || words(f || 'other');
    const plural = (n, one, many) => `${F.whole(n)}${NB}${n === 1 ? one : many || one + 's'}`;
    const DTYPE = { float32: 'fp32', bfloat16: 'bf16', float16: 'fp16', float64: 'fp64' };
    const dtype = d => DTYPE[d] || d || '';
    const ARCH = {
      llama: 'Llama',
      gpt2: 'GPT-2',
      bert: 'BERT',
      vit: 'ViT',
      qwen2: 'Qwen2',
      mistral: 'Mistral',
      roberta: 'RoBERTa',
      distilbert: 'DistilBERT',
    };
    const architecture = a => ARCH[a] || words(a || '');

    /* reading what people type; each gives a number or NaN */
    const parseNumber = text => {
      const t = String(text)
        .replace(/[\s\u00a0,_]/g, '')
        .replace(/\u2212/g, '-');
      const m = /^([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([kmg%]?)$/i.exec(t);
      if (!m) return NaN;
      const unit = m[2].toLowerCase(),
        v = parseFloat(m[1]);
      return unit === '%' ? Number((v / 100).toPrecision(12)) : v * ({ k: 1e3, m: 1e6, g: 1e9 }[unit] || 1);
    };
    const parseMinutes = text => {
      const t = String(text)
        .replace(/\u00a0/g, ' ')
        .trim()
        .toLowerCase();
      let m = /^(\d+):([0-5]?\d)(?::([0-5]?\d))?$/.exec(t);
      if (m) return m[3] === undefined ? +m[1] + m[2] / 60 : m[1] * 60 + +m[2] + m[3] / 60;
      m = /^(\d+\.?\d*|\.\d+)\s*(s|sec|seconds?|m|min|minutes?|h|hours?)?$/.exec(t);
      if (!m) return NaN;
      return parseFloat(m[1]) * (!m[2] || m[2][0] === 'm' ? 1 : m[2][0] === 's' ? 1 / 60 : 60);
    };
    /* a number as it is written in a field: short, and read back to the same value */
    const plain = x => {
      if (typeof x !== 'number') return String(x);
      const a = Math.abs(x);
      return a !== 0 && (a < 0.001 || a >= 1e7) ? x.toExponential().replace('e+', 'e') : String(x);
    };

    const button = (label, icon, onclick, cls = '') =>
      h(
        'button',
        { type: 'button', class: 'ft-btn ' + cls, onclick },
        icon ? F.icon(icon) : null,
        h('span', { class: 'lab' }, label),
      );
    const iconButton = (label, icon, onclick, cls = '') =>
      h('button', { type: 'button', class: 'ft-btn icon ' + cls, 'aria-label': label, title: label, onclick }, F.icon(icon));
    const segmented = (label, options, value, onpick) => {
      const root = h('span', { class: 'ft-seg', role: 'group', 'aria-label': label });
      root.set = v => root.querySelectorAll('button').forEach(b => b.setAttribute('aria-pressed', String(b.dataset.v === v)));
      for (const [v, text] of options)
        root.append(
          h(
            'button',
            {
              type: 'button',
              'data-v': v,
              onclick: () => {
                root.set(v);
                onpick(v);
              },
            },
            text,
          ),
        );
      root.set(value);
      return root;
    };
    const note = (kind, ...children) => F.note(null, kind, ...children);
    const debounce = (f, ms) => {
      let t;
      const g = (...a) => {
        clearTimeout(t);
        t = setTimeout(() => f(...a), ms);
      };
      g.cancel = () => clearTimeout(t);
      return g;
    };
    /* smallest of 1, 2, 5 x 10^n that is at least x */
    const nice = x => {
      if (!(x > 0)) return 1;
      const p = 10 ** Math.floor(Math.log10(x));
      return [1, 2, 5, 10].map(m => m * p).find(v => v >= x * 0.999999);
    };
    /* a card's figures, whatever their names: texts and numbers, or {value, low, high, unit, n} */
    const figure = v => {
      if (v === null || v === undefined) return null;
      if (typeof v === 'object' && !Array.isArray(v))
        return [
          v.value !== undefined ? F.interval(v.value, v.low, v.high, v.unit || v.metric) : JSON.stringify(v),
          v.n ? `, n = ${F.whole(v.n)}` : '',
        ].join('');
      return typeof v === 'number'
        ? Number.isInteger(v)
          ? F.whole(v)
          : F.fig(v, 4)
        : Array.isArray(v)
          ? v.join(', ')
          : String(v);
    };
    /* a refusal as people read it beside the field: what is wrong, then the remedy */
    const sentence = error => {
      if (!error) return '';
      if (typeof error === 'string') return error;
      if (!error.problem) return error.text || error.message || 'Something went wrong.';
      const cap = s => s && s[0].toUpperCase() + s.slice(1),
        end = s => (/[.?!]$/.test(s) ? s : s + '.');
      return end(cap(error.problem)) + (error.remedy ? ' ' + end(cap(error.remedy)) : '');
    };
    /* server functions that answer {error} instead of rejecting, so that each caller says it where it belongs */
    const asking = (server, names) =>
      Object.fromEntries(
        names.map(n => [
          n,
          async (given, options) => {
            try {
              return await F.call(server, n, given, { retry: false, ...options });
            } catch (e) {
              return { error: e, lost: F.isLost() };
            }
          },
        ]),
      );

    return {
      h,
      familyName,
      FAMILY,
      NB,
      words,
      plural,
      dtype,
      architecture,
      parseNumber,
      parseMinutes,
      plain,
      button,
      iconButton,
      segmented,
      note,
      debounce,
      nice,
      sentence,
      asking,
      figure,
    };
  })();
