/* The New run page: one spec, the panels that show it, and what the server says about it.
   The spec is the same mapping that a YAML file holds; nothing about the form lives anywhere else. */
(() => {
'use strict';
const { h, button, sentence, debounce, parseNumber, note, asking } = fettle.form, parts = fettle.parts, fill = fettle.replace, icon = fettle.icon;
const DRAFT = 'fettle.draft';
const CALLS = ['boot', 'plan', 'profile', 'preview', 'costs', 'start', 'clone', 'preset', 'save_preset', 'as_text'];

/* ---- the one state of the page ---- */
class Form {
  constructor(server, root) {
    this.server = server; this.root = root; this.listeners = {};
    this.spec = null; this.boot = null; this.forecast = null; this.refused = null;
    this.typed = {};                     // path -> text that could not be read; kept so that nothing typed is lost
    this.errors = {};                    // path -> sentence
    this.view = {};                      // what is open and chosen in the panels, kept with the draft
    this.sent = 0; this.shown = 0; this.flying = false; this.again = false;
    this.save = debounce(() => this.keep(), 250);
  }
  on(what, f) { (this.listeners[what] = this.listeners[what] || []).push(f); return this; }
  tell(what, ...a) { for (const f of this.listeners[what] || []) f(...a); }

  method(id) { return this.boot.methods.find(m => m.id === id); }
  stageName(i) { const s = this.spec.pipeline[i], m = s && this.method(s.method); return m ? m.name : s ? s.method : ''; }

  get(path) { return path.split('.').reduce((n, k) => (n === undefined || n === null ? undefined : n[k]), this.spec); }
  /* set a dotted path; undefined removes it. `quiet` leaves rebuilding to the caller (a slider that moves). */
  set(path, value, what = 'value') {
    const parts = path.split('.');
    let n = this.spec;
    for (const k of parts.slice(0, -1)) {
      if (k === 'data' && typeof n.data === 'string') n.data = { source: n.data };
      n = n[k] = n[k] === undefined || n[k] === null ? {} : n[k];
    }
    if (value === undefined) delete n[parts[parts.length - 1]]; else n[parts[parts.length - 1]] = value;
    this.clear(path);
    this.changed(what, path);
  }
  /* what was typed at path cannot be used: say so there, keep the text and the last good value */
  wrong(path, text, message) {
    this.typed[path] = text; this.errors[path] = message;
    this.save(); this.tell('errors'); this.tell('forecast');
  }
  clear(path) {
    if (!(path in this.errors) && !(path in this.typed)) return;
    delete this.errors[path]; delete this.typed[path];
    this.tell('errors');
  }
  changed(what = 'value', path = '') {
    this.save();
    this.tell('change', what, path);
    if (what === 'pipeline' || what === 'all') this.tell(what);
    if (what === 'all') this.tell('pipeline');
    this.plan();
  }
  replace(spec, typed = {}) {
    this.spec = Object.assign({ budget: {}, pipeline: [], seed: 0 }, spec);
    this.spec.pipeline = this.spec.pipeline.map(s => this.complete(s));
    this.typed = typed; this.errors = {}; this.refused = null; this.forecast = null;
    this.changed('all');
  }
  /* a stage with every hyperparameter present, so that each field shows what will be used */
  complete(stage) {
    const s = typeof stage === 'string' ? { method: stage } : { ...stage }, m = this.method(s.method);
    for (const f of m ? m.hyperparameters : []) if (!(f.name in s)) s[f.name] = f.default;
    return s;
  }
  keep() {
    try { localStorage.setItem(DRAFT, JSON.stringify({ spec: this.spec, typed: this.typed, view: this.view,
      errors: Object.fromEntries(Object.keys(this.typed).map(k => [k, this.errors[k]])) })); } catch (e) { /* private mode: no draft */ }
  }
  draft() { try { return JSON.parse(localStorage.getItem(DRAFT) || 'null'); } catch (e) { return null; } }

  /* forecast, 40 ms after the last change; one question in flight, and only the newest answer is painted */
  plan() {
    clearTimeout(this.timer);
    if (this.asked === undefined) this.asked = performance.now();
    this.timer = setTimeout(() => this.ask(), 40);
  }
  async ask() {
    if (this.flying) { this.again = true; return; }
    this.flying = true;
    const t0 = this.asked; this.asked = undefined;
    const answer = await this.server.plan({ spec: this.spec });
    this.flying = false;
    if (answer.lost) {
      this.refused = { lost: true, text: 'The workbench does not answer; the settings are kept in this browser.' };
      clearTimeout(this.retry); this.retry = setTimeout(() => this.ask(), 2000);
    } else if (answer.error) { this.refused = this.place(answer.error); this.forecast = null; }
    else { this.refused = null; this.forecast = answer; }
    this.dropRefusals();
    this.tell('errors'); this.tell('forecast');
    if (t0 !== undefined) this.root.dataset.forecastMs = (performance.now() - t0).toFixed(1);
    this.root.dataset.forecasts = String(++this.shown);
    if (this.again) { this.again = false; this.ask(); }
    else if (this.forecast && this.forecast.verdict === 'over') { clearTimeout(this.remedy); this.remedy = setTimeout(() => this.askRemedies(), 150); }
  }
  /* the smallest changes that fit take the planner a dozen forecasts: asked for when the handle rests */
  async askRemedies() {
    const spec = JSON.stringify(this.spec), answer = await this.server.plan({ spec: this.spec, remedies: true });
    if (answer.error || spec !== JSON.stringify(this.spec) || !this.forecast) return;
    this.forecast.changes = answer.changes; this.tell('forecast');
  }
  /* where on the page a refusal belongs: lora.rank -> pipeline.1.rank, pipeline[1] -> pipeline.1, data.text, budget.minutes ... */
  place(error) {
    let path = String(error.field || '').replace(/\[(\d+)\]/g, '.$1');
    const [head, field] = path.split('.'), P = this.spec.pipeline;
    if (!['pipeline', 'budget', 'training', 'data', 'model', 'seed', 'name', 'task'].includes(head)) {
      const same = P.findIndex(s => s.method === head && (!field || JSON.stringify(s[field]) === JSON.stringify(error.value)));
      const any = same >= 0 ? same : P.findIndex(s => s.method === head || (field === undefined && head in s));
      if (any >= 0) path = field ? `pipeline.${any}.${field}` : head in P[any] ? `pipeline.${any}.${head}` : `pipeline.${any}`;
    }
    if (path === 'data.source') path = 'data';
    return { ...error, path, text: sentence(error) };
  }
  dropRefusals() {
    for (const k of Object.keys(this.errors)) if (!(k in this.typed)) delete this.errors[k];
    if (this.refused && this.refused.path) this.errors[this.refused.path] = this.refused.text;
  }
  /* an error beside the field `input`: colours it, writes the sentence, keeps both in step */
  bindError(path, input, line) {
    line.id = line.id || 'e' + Math.random().toString(36).slice(2, 9);
    line.classList.add('nr-err');
    const paint = () => {
      if (!line.isConnected && paint.seen) { this.listeners.errors = this.listeners.errors.filter(f => f !== paint); return; }
      paint.seen = line.isConnected;
      const text = this.errors[path] || '';
      if (line.textContent !== text) line.textContent = text;
      line.hidden = !text;
      if (text) { input.setAttribute('aria-invalid', 'true'); input.setAttribute('aria-describedby', line.id); }
      else { input.removeAttribute('aria-invalid'); input.removeAttribute('aria-describedby'); }
    };
    this.on('errors', paint); paint();
  }
  get blocked() {
    const bad = Object.keys(this.errors);
    if (bad.length) return this.errors[bad[0]];
    if (this.refused) return this.refused.text;
    if (!this.spec || !this.spec.pipeline.length) return 'Add a stage to the pipeline first.';
    return '';
  }
}

/* ---- first row: preset, name, seed, copies ---- */
function titleRow(form, at) {
  const S = form.server;
  const choose = async id => {
    const got = await S.preset({ name: id });
    if (got.error) { status(sentence(got.error)); return; }
    form.view.preset = id;
    form.replace({ ...structuredClone(got.spec), name: form.spec.name });
  };
  const preset = h('select', { class: 'ft-in ft-sel nr-preset', onchange: () => choose(preset.value) });
  const back = h('button', { type: 'button', class: 'ft-btn quiet nr-back', title: 'Back to the preset as it was saved', hidden: true, onclick: () => { choose(form.view.preset); preset.focus(); } }, 'Changed, reset');
  const plain = o => JSON.stringify(o, (k, v) => (v && typeof v === 'object' && !Array.isArray(v) ? Object.fromEntries(Object.entries(v).filter(([, x]) => x !== null && x !== undefined).sort()) : v));
  const compare = () => {
    const p = form.boot.presets.find(x => x.id === form.view.preset);
    back.hidden = !p || !form.spec || plain({ ...p.spec, name: null, pipeline: p.spec.pipeline.map(s => form.complete(s)) }) === plain({ ...form.spec, name: null });
  };
  const options = () => {
    const own = form.boot.presets.filter(p => p.own), bundled = form.boot.presets.filter(p => !p.own);
    const opt = p => h('option', { value: p.id }, p.title || p.id);
    fill(preset, ...bundled.map(opt), own.length ? h('optgroup', { label: 'Saved here' }, ...own.map(opt)) : null);
    if (!form.boot.presets.some(p => p.id === form.view.preset)) preset.prepend(h('option', { value: '', disabled: true }, 'Your settings'));
    preset.value = form.boot.presets.some(p => p.id === form.view.preset) ? form.view.preset : '';
  };
  const name = h('input', { class: 'ft-in nr-name', 'aria-label': 'Name of the run', maxlength: 80, spellcheck: 'false',
    oninput: () => { form.view.named = true; form.set('name', name.value.trim() || undefined); } });
  const seedLine = h('span', { role: 'alert' });
  const seed = h('input', { class: 'ft-in n nr-seed', inputmode: 'numeric', 'aria-label': 'Seed', oninput: () => {
    const v = parseNumber(seed.value);
    if (!Number.isInteger(v) || v < 0 || v >= 2 ** 31) form.wrong('seed', seed.value, 'Not a whole number from 0 to 2,147,483,647. Give for example 0.');
    else form.set('seed', v);
  } });
  const live = h('span', { class: 'vh', role: 'status' }), line = h('span', { class: 'sm mut nr-said' });
  const status = t => { line.textContent = live.textContent = t; clearTimeout(status.t); status.t = setTimeout(() => (line.textContent = ''), 8000); };
  form.status = status;

  const yaml = button('Copy as YAML', 'i-copy', async () => {
    const got = await S.as_text({ spec: form.spec });
    if (got.error) return status(sentence(got.error));
    fettle.copy(got.yaml, 'Copied as YAML');
  }, 'quiet nr-yaml');
  const box = h('form', { class: 'nr-pop', hidden: true, onsubmit: async e => {
    e.preventDefault();
    const got = await S.save_preset({ name: field.value, spec: form.spec });
    if (got.error) { why.textContent = sentence(got.error); field.setAttribute('aria-invalid', 'true'); field.focus(); return; }
    form.boot.presets = got.presets; form.view.preset = got.id; options(); compare(); form.save(); close();
    status(`Saved as ${got.id}.`);
  }, onkeydown: e => { if (e.key === 'Escape') close(); } });
  const field = h('input', { class: 'ft-in', 'aria-label': 'Name of the preset', placeholder: 'prune-half-then-int8', maxlength: 60, oninput: () => { why.textContent = ''; field.removeAttribute('aria-invalid'); } });
  const why = h('span', { class: 'nr-err', role: 'alert' });
  box.append(h('span', { class: 'row' }, field, h('button', { class: 'ft-btn primary' }, 'Save preset')), why);
  const close = () => { box.hidden = true; save.setAttribute('aria-expanded', 'false'); save.focus(); };
  const save = button('Save preset', 'i-save', () => {
    box.hidden = !box.hidden; save.setAttribute('aria-expanded', String(!box.hidden));
    if (!box.hidden) { field.value = form.view.preset && form.boot.presets.some(p => p.own && p.id === form.view.preset) ? form.view.preset : ''; field.focus(); }
  }, 'quiet');
  save.setAttribute('aria-expanded', 'false');
  fill(at, h('h1', null, 'New run'),
    h('label', { class: 'row nr-f1' }, h('span', { class: 'dim sm' }, 'Preset'), preset), back,
    h('label', { class: 'row nr-f2' }, h('span', { class: 'dim sm' }, 'Name'), name),
    h('label', { class: 'row nr-f3' }, h('span', { class: 'dim sm' }, 'Seed'), seed), seedLine, line, live,
    h('span', { class: 'grow' }), yaml, h('span', { class: 'nr-anchor' }, save, box));
  form.bindError('seed', seed, seedLine);
  form.on('all', () => { options(); name.value = form.spec.name || ''; seed.value = 'seed' in form.typed ? form.typed.seed : form.spec.seed; });
  form.on('change', compare).on('pipeline', compare);
  form.on('renamed', () => { name.value = form.spec.name || ''; });
}

/* ---- start, queue, command ---- */
function actions(form, at, dock) {
  const S = form.server;
  const over = () => !!form.forecast && form.forecast.verdict === 'over';
  const go = async queue => {
    const reason = form.blocked;
    if (reason) { say('bad', reason); focusFirstError(); return; }
    busy(true);
    const got = await S.start({ spec: form.spec, queue, force: over(), parent: form.parent || null });
    busy(false);
    if (got.error) {
      const r = typeof got.error === 'string' ? { text: got.error } : form.place(got.error);
      if (r.path) form.errors[r.path] = r.text;
      form.tell('errors'); say('bad', r.text); return;
    }
    form.view.named = false;
    dispatchEvent(new Event('fettle-changed'));
    if (got.next_name) { form.spec.name = got.next_name; form.tell('renamed'); }
    form.keep();
    if (!queue) { fettle.go('/live', { run: got.run }); return; }
    say('good', h('b', null, got.name), got.place ? ` is queued, ${got.place}. ` : ' is queued. ', h('a', { href: '/live?run=' + encodeURIComponent(got.run) }, 'Watch it'));
  };
  const focusFirstError = () => { const f = form.root.querySelector('[aria-invalid="true"]'); if (f) { f.focus(); f.scrollIntoView({ block: 'center' }); } };
  const starts = [button('Start run', 'i-play', () => go(false), 'primary big grow nr-start'), button('Start run', 'i-play', () => go(false), 'primary')];
  const queues = [button('Queue', null, () => go(true), 'big nr-queue'), button('Queue', null, () => go(true))];
  const code = h('code'), cmd = h('button', { type: 'button', class: 'ft-btn icon', 'aria-label': 'Copy as command', title: 'Copy as command', onclick: async () => {
    const got = await S.as_text({ spec: form.spec });
    if (got.error) return say('bad', sentence(got.error));
    fettle.copy(got.command, 'Command copied');
  } }, icon('i-copy'));
  const out = h('div', { class: 'nr-out', role: 'status' });
  const say = (kind, ...text) => fill(out, note(kind, ...text));
  fill(at, starts[0], queues[0], out, h('div', { class: 'ft-copy' }, code, cmd));
  const dv = h('span', { class: 'v b row' }), dn = h('span', { class: 'sm mut num grow' });
  fill(dock, h('div', { class: 'row' }, dv, dn, queues[1], starts[1]));
  const busy = on => [...starts, ...queues].forEach(b => { b.disabled = on; b.setAttribute('aria-busy', String(on)); });
  const text = debounce(async () => {
    const got = await S.as_text({ spec: form.spec });
    if (got && got.command) { code.textContent = got.command; code.title = got.command; }
  }, 350);
  form.on('change', text);
  form.on('all', () => fill(out));
  form.on('forecast', () => {
    const reason = form.blocked, v = form.verdict || {};
    starts.forEach(b => {
      b.toggleAttribute('aria-disabled', !!reason); b.title = reason;
      b.classList.toggle('nr-blocked', !!reason);
      b.querySelector('.lab').textContent = over() && !reason ? 'Start anyway' : 'Start run';
    });
    queues.forEach(b => { b.toggleAttribute('aria-disabled', !!reason); b.title = reason; b.classList.toggle('nr-blocked', !!reason); b.querySelector('.lab').textContent = over() && !reason ? 'Queue anyway' : 'Queue'; });
    fill(dv, icon(v.icon || 'i-info'), v.word || 'Forecast'); dv.className = 'v b row ' + (v.kind || '');
    fill(dn, ...(v.dock || []).flatMap((t, i) => (i ? [h('br'), t] : [t])));
    if (!reason && out.querySelector('.bad')) fill(out);
  });
}

/* ---- assembly ---- */
async function mount(element, server) {
  const root = element.querySelector('.nr') || element, $ = s => root.querySelector(s);
  const form = new Form(server, root);
  fettle.newRun = form;
  const boot = await server.boot({}, { retry: true });
  if (boot.error) {
    fill($('.nr-title'), h('h1', null, 'New run'));
    $('.nr-title').after(note('bad', sentence(boot.error)));
    return form;
  }
  form.boot = boot;
  const q = new URLSearchParams(location.search), draft = form.draft();
  form.view = (draft && draft.view) || {};
  titleRow(form, $('.nr-title'));
  parts.modelPicker(form, $('.nr-model'));
  parts.dataPicker(form, $('.nr-data'));
  parts.pipeline(form, $('.nr-pipe'));
  parts.methodCards(form, $('.nr-methods'));
  parts.budget(form, $('.nr-budget'));
  actions(form, $('.ft-cta'), $('.ft-dock'));

  let spec = null, typed = {}, lines = '';
  const clone = q.get('clone'), preset = q.get('preset');
  if (clone) {
    const got = await server.clone({ run: clone });
    if (got.error) lines = sentence(got.error);
    else { spec = got.spec; form.parent = got.run; form.view.preset = ''; lines = `Settings of ${got.name}.`; form.view.named = false; }
  } else if (preset) {
    const got = await server.preset({ name: preset });
    if (got.error) lines = sentence(got.error); else { spec = got.spec; form.view.preset = preset; }
  }
  if (!spec && draft && draft.spec && draft.spec.model !== undefined) { spec = draft.spec; typed = draft.typed || {}; }
  if (!spec) { spec = structuredClone(boot.spec); form.view.preset = boot.preset; }
  if (!form.view.named || !spec.name) { spec = { ...spec, name: boot.name }; form.view.named = false; }
  form.replace(spec, typed);
  if (typed === (draft || {}).typed) Object.assign(form.errors, draft.errors || {});
  const add = q.get('method');
  if (add && form.method(add) && !form.spec.pipeline.some(s => s.method === add)) { form.addStage(add); lines = `${form.method(add).name} added to the pipeline.`; }
  else if (add && !form.method(add)) lines = `There is no method called ${add}.`;
  for (const [key, field] of [['model', 'model'], ['data', 'data']])
    if (q.get(key)) { form.set(field, q.get(key)); form.tell('all'); }
  if (clone || preset || add || q.get('model') || q.get('data')) history.replaceState(null, '', location.pathname);
  if (lines) form.status(lines);
  form.tell('errors');
  root.removeAttribute('aria-busy');
  return form;
}
mount(element, asking(server, CALLS));
})();
