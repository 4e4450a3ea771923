/* Recommend: a budget, and the pipelines that fit it by expected quality. The choice is in the address; a row becomes a run, rows a sweep. */
(() => {
  'use strict';
  const F = fettle,
    { h, NB, button, parseNumber, parseMinutes, plain, familyName, sentence } = F.form;
  const root = element.querySelector('.rc'),
    $ = s => root.querySelector(s),
    fill = F.replace;
  const FIRST = 16; // rows shown before "Show all"
  const KEYS = ['minutes', 'memory_gb', 'trainable', 'size_mb', 'joules', 'quality'];
  const FROM = {
    history: ['runs', 'There are runs like this one here'],
    transfer: ['partly', 'From runs that are only partly like this one, and priors'],
    prior: ['prior', 'From published figures and rules of thumb: no run here is like it'],
  };
  let boot = null,
    spec = null,
    found = null,
    family = '',
    chosen = new Set(),
    open = false,
    asked = 0,
    started = false;
  const fields = {},
    errors = {};
  const source = d => (typeof d === 'string' ? d : d.source);
  const percent = () => (found ? found.metric === 'accuracy' : (task() || '').includes('classification'));
  const task = () => (boot.data.find(d => d.id === source(spec.data)) || {}).task;

  /* ---------- the form ---------- */
  const read = (key, text) => {
    const t = text.trim();
    if (!t) return null;
    const v = key === 'minutes' ? parseMinutes(t) : parseNumber(t.replace(/\s*(gb|mb|j|min|bits\/byte)$/i, ''));
    return v;
  };
  const write = (key, v) =>
    v === undefined || v === null ? '' : key === 'trainable' ? (v <= 1 ? plain(+(v * 100).toPrecision(6)) + ' %' : F.whole(v)) : plain(v);
  function field(name, input, unit, id) {
    const line = h('span', { class: 'rc-err', role: 'alert', hidden: true });
    errors[id] = line;
    fields[id] = input;
    return h('label', { class: 'rc-field', 'data-field': id }, h('span', { class: 'dim sm' }, name), h('span', { class: 'row' }, input, unit), line);
  }
  const say = (id, text) => {
    const line = errors[id];
    if (!line) return false;
    line.textContent = text;
    line.hidden = !text;
    fields[id].setAttribute('aria-invalid', String(!!text));
    return true;
  };
  function form() {
    const pick = (id, label, rows, hint) => {
      const list = h('datalist', { id: 'rc-' + id }, ...rows.map(r => h('option', { value: r.id }, r.task)));
      const input = h('input', {
        class: 'ft-in',
        list: 'rc-' + id,
        value: source(spec[id]),
        placeholder: hint,
        spellcheck: 'false',
        autocomplete: 'off',
        'aria-label': label,
        onchange: () => {
          const t = input.value.trim();
          if (!t) return say(id, `No ${label.toLowerCase()} yet. ${hint}.`);
          spec[id] = t;
          pair(id);
          paintUnits();
          ask();
        },
      });
      input.addEventListener('focus', () => input.select());
      return [field(label, input, null, id), list];
    };
    const limits = boot.limits.map(L => {
      const input = h('input', {
        class: 'ft-in n',
        value: write(L.key, spec.budget[L.key]),
        placeholder: 'no limit',
        autocomplete: 'off',
        'aria-label': `${L.name} limit, for example ${L.example}`,
      });
      input.addEventListener('input', () => {
        const v = read(L.key, input.value);
        const remedy = `Give for example ${L.example}, or leave it empty.`;
        if (v !== null && !isFinite(v)) return say(L.key, `“${input.value.trim()}” is not a number. ${remedy}`);
        if (v !== null && v <= 0) return say(L.key, `A limit must be above zero. ${remedy}`);
        say(L.key, '');
        if (v === null) delete spec.budget[L.key];
        else spec.budget[L.key] = v;
        later();
      });
      const unit = h('span', { class: 'u dim sm', 'data-unit': L.key }, L.unit);
      if (L.key === 'joules' && !boot.energy) input.title = 'No energy counter on this machine: the limit would be said, not kept';
      return field(L.name, input, unit, L.key);
    });
    fill($('.rc-form'), h('div', { class: 'rc-pick' }, ...pick('model', 'Model', boot.models, 'Bundled id, folder or hub id'),
      ...pick('data', 'Data', boot.data, 'Bundled id, file, folder or hub id')), h('div', { class: 'rc-limits' }, ...limits));
    paintUnits();
  }
  /* an image model with texts, or the reverse, cannot run: the other one follows */
  function pair(what) {
    const image = x => (x.task || '').startsWith('image'),
      m = boot.models.find(x => x.id === spec.model),
      d = boot.data.find(x => x.id === source(spec.data));
    if (!m || !d || image(m) === image(d)) return;
    const key = what === 'model' ? 'data' : 'model',
      other = (key === 'data' ? boot.data : boot.models).find(x => image(x) === image(what === 'model' ? m : d));
    if (!other) return;
    spec[key] = other.id;
    fields[key].value = other.id;
  }
  const paintUnits = () => {
    const share = root.querySelector('[data-unit="quality"]'),
      p = percent();
    share.textContent = p ? '% at least' : 'bits/byte at most';
    fields.quality.placeholder = 'no floor';
    root.querySelector('[data-unit="trainable"]').textContent = 'at most';
  };

  /* ---------- asking ---------- */
  const later = F.debounce(() => ask(), 450);
  async function ask() {
    if ([...Object.values(errors)].some(e => !e.hidden && e.dataset.from !== 'server')) return;
    const mine = ++asked;
    address();
    root.setAttribute('aria-busy', 'true');
    let answer, error;
    try {
      answer = await F.call(server, 'recommend', { spec }, { timeout: 60000 });
    } catch (e) {
      error = e;
    }
    if (mine !== asked) return;
    root.removeAttribute('aria-busy');
    for (const [id, line] of Object.entries(errors)) if (line.dataset.from === 'server') (delete line.dataset.from, say(id, ''));
    if (error) {
      const id = String(error.field || '').replace(/^budget\./, '').split('.')[0];
      if (say(id, sentence(error))) errors[id].dataset.from = 'server';
      fill($('.rc-say'), errors[id] ? null : F.note(null, 'bad', sentence(error)));
      found = null;
      return paint();
    }
    found = answer;
    chosen = new Set(answer.rows.filter(r => r.tier === 'A').slice(0, 6).map(r => r.text));
    paintUnits();
    fill(
      $('.rc-say'),
      ...answer.contradictions.map(c => F.note(null, 'bad', sentence(c))),
      ...answer.notes.map(t => F.note(null, 'info', t)),
    );
    paint();
  }
  const address = () =>
    F.query.set({
      model: spec.model,
      data: source(spec.data),
      ...Object.fromEntries(KEYS.map(k => [k, spec.budget[k] === undefined ? null : spec.budget[k]])),
    });

  /* ---------- the table ---------- */
  const figure = (v, metric) => (metric === 'accuracy' ? (100 * v).toFixed(1) : v.toFixed(3));
  /* quality on one scale: the metric itself, or the change against the base where that is not known */
  const onScale = e => {
    if (e.value !== null) {
      const k = e.metric === 'accuracy' ? 100 : 1;
      return { value: k * e.value, low: k * e.low, high: k * e.high, metric: e.metric };
    }
    if (e.metric === 'accuracy') return { value: e.gain, low: e.gain_low, high: e.gain_high, metric: 'accuracy log-odds' };
    const c = g => 100 * (Math.exp(-g) - 1);
    return { value: c(e.gain), low: c(e.gain_high), high: c(e.gain_low), metric: 'bits, % against the base' };
  };
  const words = e => {
    const s = onScale(e);
    if (e.value !== null) return [h('b', { class: 'num' }, figure(e.value, e.metric)), h('span', { class: 'dim num' }, ` ${figure(e.low, e.metric)} to ${figure(e.high, e.metric)}`)];
    const sign = v => {
      const t = v.toFixed(e.metric === 'accuracy' ? 2 : 0);
      return +t === 0 ? '0' : (v > 0 ? '+' : '') + t.replace('-', '−');
    };
    const u = e.metric === 'accuracy' ? '' : NB + '%';
    return [h('b', { class: 'num' }, sign(s.value) + u), h('span', { class: 'dim num' }, ` ${sign(s.low)} to ${sign(s.high)}`)];
  };
  const W = 160,
    H = 22;
  function bar(e, scale, base) {
    const s = onScale(e),
      svg = F.svg('svg', { width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${s.value.toFixed(3)}, ${s.low.toFixed(3)} to ${s.high.toFixed(3)} ${s.metric}` });
    const X = v => 6 + ((Math.max(scale.a, Math.min(scale.b, v)) - scale.a) / (scale.b - scale.a)) * (W - 12);
    for (const t of scale.ticks) svg.append(F.svg('line', { class: 'grid', x1: X(t), x2: X(t), y1: 0, y2: H }));
    if (F.finite(base) && base > scale.a && base < scale.b) svg.append(F.svg('line', { class: 'ref', x1: X(base), x2: X(base), y1: 0, y2: H }));
    svg.append(F.svg('line', { class: 'band ' + e.source, x1: X(s.low), x2: X(s.high), y1: H / 2, y2: H / 2 }));
    const out = s.value > scale.b || s.value < scale.a;
    svg.append(F.svg('path', { class: 'dot ' + e.source, d: F.PATHS[out ? (s.value > scale.b ? 'right' : 'left') : 'circle'], transform: `translate(${X(s.value).toFixed(1)} ${H / 2}) scale(.85)` }));
    return svg;
  }
  const axis = scale =>
    F.svg('svg', { width: W, height: 14, viewBox: `0 0 ${W} 14`, 'aria-hidden': 'true' },
      ...scale.ticks.filter((_, i, all) => all.length < 6 || i % 2 === 0).map(t =>
        F.svg('text', { x: 6 + ((t - scale.a) / (scale.b - scale.a)) * (W - 12), y: 10, 'text-anchor': 'middle' }, t.toFixed(scale.places).replace('-', '−'))));
  const stages = r => {
    const parts = r.text.split(' → ');
    return parts.flatMap((t, i) => [
      i ? h('span', { class: 'dim' }, ' → ') : null,
      h('span', { class: 'stage', title: familyName(boot.methods[r.methods[i]]) }, F.family(boot.methods[r.methods[i]]), t),
    ]);
  };
  const setUp = (r, patch) => {
    const made = structuredClone(r.spec);
    for (const [path, value] of Object.entries(patch || {})) {
      const parts = path.split('.');
      let n = made;
      for (const k of parts.slice(0, -1)) n = n[k] = n[k] === undefined ? {} : n[k];
      n[parts[parts.length - 1]] = value;
    }
    F.go('/', { spec: JSON.stringify(made) });
  };
  const rows = () => (found ? found.rows.filter(r => !family || r.families.includes(family)) : []);

  function tools() {
    const picked = rows().filter(r => chosen.has(r.text));
    const sweep = button(picked.length === 1 ? 'Sweep over 1 row' : `Sweep over ${picked.length} rows`, 'i-table', () =>
      F.go('/sweeps', { specs: JSON.stringify(picked.map(r => r.spec)) }), 'quiet');
    sweep.disabled = !picked.length;
    const copy = button('Copy as command', 'i-copy', async () => {
      const got = await F.call(server, 'command', { spec });
      F.copy(got.recommend);
    }, 'quiet');
    fill(root.querySelector('.ft-tools'), sweep, copy);
  }
  function paint() {
    const all = rows();
    fill(
      root.querySelector('.ft-chips'),
      ...['', ...boot.families.filter(f => (found ? found.rows : []).some(r => r.families.includes(f)))].map(f =>
        h('button', { type: 'button', class: 'ft-chip', 'aria-pressed': String(family === f), onclick: () => ((family = f), paint()) }, f ? familyName(f) : 'All')),
    );
    $('.rc-count').textContent = found ? `${found.fitting} of ${found.considered} forecast` : '';
    tools();
    const scale = found && found.rows.length ? F.intervals.scale(found.rows.slice(0, Math.max(8, Math.ceil(found.rows.length * 0.6))).map(r => onScale(r.expected))) : null;
    const base = found && found.base !== null ? (found.metric === 'accuracy' ? 100 * found.base : found.base) : 0;
    if (!all.length) {
      fill($('.rc-fit'), h('div', { class: 'ft-empty' }, h('h3', null, found ? 'No pipeline fits' : 'Nothing to rank'),
        h('p', null, found ? (family ? 'None of this family. Choose All, or raise a limit.' : 'Raise a limit, or take one of the changes below.') : 'Correct what is marked above.')));
    } else {
      const unit = onScale(all[0].expected).metric;
      fill($('.rc-fit'), h('table', { class: 'ft-table' },
        h('thead', null, h('tr', null, h('th', { scope: 'col' }, h('span', { class: 'vh' }, 'Chosen')), h('th', { scope: 'col' }, 'Tier'), h('th', { scope: 'col' }, 'Pipeline'),
          h('th', { scope: 'col' }, 'Expected ', h('span', { class: 'u' }, unit === 'accuracy' ? '%' : unit)), h('th', { class: 'c-bar' }, scale ? axis(scale) : null), h('th', { scope: 'col' }, 'From'),
          h('th', { class: 'r', scope: 'col' }, 'Time'), h('th', { class: 'r', scope: 'col' }, 'Peak'), h('th', { class: 'r', scope: 'col' }, 'Size'), h('th', { class: 'r', scope: 'col' }, 'Trainable'),
          h('th', { scope: 'col' }, 'Why'), h('th', { scope: 'col' }))),
        h('tbody', null, ...all.slice(0, open ? all.length : FIRST).map((r, i) => line(r, scale, base, i && all[i - 1].tier === r.tier)))),
        !open && all.length > FIRST ? h('p', { class: 'rc-more' }, button(`Show all ${all.length}`, null, () => ((open = true), paint()), 'quiet')) : null);
    }
    $('.rc-foot').textContent = found ? `${found.basis} Rows of one tier cannot be told apart at 90 %. Bars are 90 % intervals${found.base !== null ? ', the dotted line is the model as it comes' : ''}.` : '';
    near(scale, base);
  }
  function line(r, scale, base, same) {
    const [word, title] = FROM[r.expected.source];
    const box = h('input', { type: 'checkbox', class: 'ft-check', checked: chosen.has(r.text), 'aria-label': `Choose ${r.text}`, onchange: () => {
      if (box.checked) chosen.add(r.text);
      else chosen.delete(r.text);
      tools();
    } });
    const rests = r.expected.priors.length ? ` Rests on: ${r.expected.priors.join('; ')}.` : '';
    return h('tr', { 'data-row': r.rank },
      h('td', null, box), h('td', null, same ? h('span', { class: 'dim' }, r.tier) : h('b', null, r.tier)), h('td', { class: 'c-pipe' }, ...stages(r), h('span', { class: 'rc-narrow' }, ...words(r.expected), button('Set up', null, () => setUp(r), 's'))),
      h('td', { class: 'c-exp' }, ...words(r.expected)), h('td', { class: 'c-bar ft-chart' }, bar(r.expected, scale, base)),
      h('td', null, h('span', { class: 'ft-tag', title: `${title}: ${r.expected.reason}.${rests}` }, word, r.expected.near ? ` ${r.expected.near}` : '')),
      h('td', { class: 'r num' }, F.clock(r.seconds)), h('td', { class: 'r num' }, F.gb(r.peak_bytes)), h('td', { class: 'r num' }, F.size(r.size_bytes)), h('td', { class: 'r num' }, r.trainable.count ? F.count(r.trainable.count) : '0'),
      h('td', { class: 'c-why', title: r.why }, r.why), h('td', { class: 'c-go' }, button('Set up this run', null, () => setUp(r), 's')));
  }
  function near(scale, base) {
    const list = found ? found.nearest.filter(r => !family || r.families.includes(family)) : [];
    $('.rc-near').hidden = !list.length;
    if (!list.length) return;
    const own = scale || F.intervals.scale(list.map(r => onScale(r.expected)));
    fill($('.rc-out'), h('table', { class: 'ft-table' },
      h('thead', null, h('tr', null, ...['Pipeline', 'Expected', '', 'Why not', 'Smallest change', ''].map(t => h('th', { scope: 'col' }, t)))),
      h('tbody', null, ...list.map(r => h('tr', null, h('td', { class: 'c-pipe' }, ...stages(r)), h('td', { class: 'c-exp' }, ...words(r.expected)),
        h('td', { class: 'c-bar ft-chart' }, bar(r.expected, own, base)), h('td', { class: 'wrap c-miss' }, r.why.replace(/^.*misses /, 'misses ')),
        h('td', { class: 'wrap' }, r.change ? r.change.text : 'no single change is enough'),
        h('td', { class: 'c-go' }, r.change ? button('Set up with it', null, () => setUp(r, r.change.patch), 's') : null))))));
  }

  /* ---------- start ---------- */
  async function begin() {
    if (started) return;
    started = true;
    boot = await F.call(server, 'boot', {});
    const q = new URLSearchParams(location.search);
    spec = structuredClone(boot.start);
    if (q.get('model')) spec.model = q.get('model');
    if (q.get('data')) spec.data = q.get('data');
    if (KEYS.some(k => q.get(k)) || q.get('model')) spec.budget = {};
    for (const k of KEYS) {
      const v = q.get(k) ? Number(q.get(k)) : NaN;
      if (isFinite(v)) spec.budget[k] = v;
    }
    form();
    paint();
    ask();
  }
  addEventListener('fettle-view', e => {
    if (e.detail === 'recommend') begin();
  });
  if (!F.query.get('view') || F.query.get('view') === 'recommend') begin();
})();
