/* Budget and forecast: sliders whose handle is the limit line on the forecast's own bar, memory by phase, what was chosen
   and why, and the smallest change when it does not fit. A move is painted at once; the server's answer follows. */
fettle.parts = fettle.parts || {};
(() => {
'use strict';
const { h, NB, words, parseNumber, parseMinutes, nice, button, note, plain } = fettle.form;
const { whole: count, size: bytes, clock, percent, fig, gb, icon } = fettle, fill = fettle.replace, el = fettle.el;
const PARTS = [['context', 'Process and libraries'], ['weights', 'Weights'], ['adapter', 'Adapter'], ['gradients', 'Gradients'], ['optimizer', 'Optimizer'],
  ['activations', 'Activations'], ['logits', 'Logits'], ['kv', 'KV cache'], ['extra', 'Work space']];
const partColour = k => `var(--ft-part-${k === 'extra' ? 'context' : k})`;
const GB = 1e9, MB = 1e6;
const mmss = m => clock(m * 60);

/* each limit: how a value is read, written and laid on its scale. `at` is the position's unit (minutes, GB, share, MB). */
const LIMITS = [
  { key: 'minutes', name: 'Minutes', unit: 'min', start: 2, floor: 1, write: mmss, tick: mmss, read: parseMinutes, example: '2:00', steps: [1, 2, 3, 5, 10, 15, 30, 60, 120, 240, 480, 960, 1440, 2880, 10080], part: 0.05 },
  { key: 'memory_gb', name: 'Memory', unit: 'GB', start: 2, floor: 0.5, write: v => (v >= 100 ? fig(v) : v.toFixed(2)), tick: v => plain(+v.toPrecision(3)), read: t => parseNumber(t.replace(/\s*gb$/i, '')), example: '2', part: 0.01 },
  { key: 'trainable', name: 'Trainable', unit: '', start: 0.05, floor: 0.001, write: v => percent(v), tick: v => plain(+(v * 100).toPrecision(3)), last: NB + '%', read: parseNumber, example: '5 % or 300,000', part: 0.0001 },
  { key: 'size_mb', name: 'Size', unit: 'MB', start: 10, floor: 0.1, write: v => fig(v), tick: v => plain(+v.toPrecision(3)), last: NB + 'MB', read: t => parseNumber(t.replace(/\s*mb$/i, '')), example: '10', part: 0.01 },
];
const STATES = { fits: ['good', 'i-check', 'Fits'], tight: ['warn', 'i-warn', 'Tight'], over: ['bad', 'i-cross', 'Does not fit'] };

function limitRow(form, L) {
  const path = 'budget.' + L.key, N = 1000;
  const box = h('input', { type: 'checkbox', class: 'ft-check' }), say = h('span', { class: 'say' });
  const input = h('input', { class: 'ft-in s n', 'aria-label': `${L.name} limit, for example ${L.example}`, autocomplete: 'off', spellcheck: 'false' });
  const set = h('span', { class: 'set' }), err = h('span', { role: 'alert' });
  const gauge = h('div', { class: 'ft-gauge' }), over = h('i', { class: 'over' }), ticks = h('div', { class: 'ft-ticks' }), labels = h('div', { class: 'nr-lbls', 'aria-hidden': 'true' });
  const slider = h('input', { type: 'range', class: 'ft-range', min: 0, max: N, step: 1, 'aria-label': `${L.name} limit` });
  const root = h('div', { class: 'ft-limit', 'data-limit': L.key }, h('label', null, box, L.name), say, set,
    h('div', { class: 'scale' }, gauge, ticks, labels, slider), err);
  let max = 0, held = false, last = L.start;
  const parameters = () => (form.profile && form.profile.parameters) || 0;
  /* the limit in the unit of the scale: a count of trainable parameters becomes a share */
  const limit = () => { const v = form.get(path); return v === undefined || v === null ? null : L.key === 'trainable' && v > 1 ? (parameters() ? v / parameters() : 1) : v; };
  const value = () => {
    const f = form.forecast;
    if (!f) return null;
    if (L.key === 'minutes') return f.seconds ? f.seconds.total / 60 : null;
    if (L.key === 'memory_gb') return f.memory ? f.memory.peak_bytes / GB : null;
    if (L.key === 'trainable') return f.trainable ? f.trainable.share : null;
    return f.size ? f.size.bytes / MB : null;
  };
  /* the end of the scale: room beyond the limit and the forecast, and still while a handle is held */
  const rescale = () => {
    if (held || (max && value() === null && (limit() || 0) <= max)) return;     // refused for now: the ruler stays as it was
    const x = Math.max((limit() || 0) * 1.4, (value() || 0) * 1.12, L.floor);
    let m;
    if (L.key === 'trainable') m = Math.min(1, [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find(s => s >= x) || 1);
    else if (L.steps) m = L.steps.find(s => s >= x) || x;
    else m = [1, 1.5, 2, 3, 4, 5, 8, 10].map(k => k * 10 ** Math.floor(Math.log10(x))).find(v => v >= x * 0.999);
    if (L.key === 'trainable' && limit() > m) m = 1;
    if (m === max) return;
    max = m;
    const parts = L.key === 'minutes' ? (m % 3 === 0 ? 3 : m % 4 === 0 ? 4 : m % 5 === 0 ? 5 : 2) : [1, 2, 4, 8].includes(m / 10 ** Math.floor(Math.log10(m) + 1e-9)) ? 4 : String(m).replace(/[.0]/g, '').startsWith('3') ? 3 : 5;
    ticks.style.setProperty('--n', parts * (parts === 3 ? 6 : 4));
    const shown = [1, 3].includes(parts) || L.key === 'minutes' ? parts : parts % 2 ? parts : parts / (parts > 4 ? 2 : 1);
    fill(labels, ...Array.from({ length: shown + 1 }, (_, k) => h('span', { class: 'lbl ' + (k === 0 ? 'first' : k === shown ? 'last' : ''), vars: { p: k / shown } },
      k === 0 && L.key !== 'minutes' ? '0' : L.tick(m * k / shown) + (k === shown ? L.last || (L.key === 'memory_gb' ? NB + 'GB' : '') : ''))));
  };
  const place = () => {
    const v = limit(), on = v !== null;
    root.classList.toggle('off', !on);
    box.checked = on;
    gauge.style.setProperty('--lim', on ? Math.min(1, v / max) : 1.2);
    if (!held) slider.value = on ? Math.round(Math.min(1, v / max) * N) : N;
    slider.setAttribute('aria-valuetext', on ? `${L.write(v)} ${L.unit}` : 'no limit');
  };
  const field = () => {
    const v = form.get(path);
    if (path in form.typed) { if (document.activeElement !== input) input.value = form.typed[path]; return; }
    if (document.activeElement === input) return;
    if (v === undefined || v === null) return;
    input.value = L.key === 'trainable' && v > 1 ? count(v) : L.write(v);
    input.style.width = Math.max(54, input.value.length * 7 + 14) + 'px';
  };
  const shown = () => {
    const on = form.get(path) !== undefined && form.get(path) !== null || path in form.typed;
    if (set.dataset.on === String(on)) return;
    set.dataset.on = String(on);
    fill(set, ...(on ? ['at most', input, L.unit] : ['no limit']));
  };
  const segments = () => {
    const f = form.forecast, v = value(), lim = limit(), tooMuch = v !== null && lim !== null && v > lim * 1.0000001;
    let parts = [];
    if (f && v !== null) {
      if (L.key === 'minutes') parts = times(f).map(p => ({ n: p.seconds / 60, c: p.c, t: p.t, s: p.s, k: p.k }));
      else if (L.key === 'memory_gb') {
        const peak = (f.memory.phases || []).find(p => p.phase === f.memory.peak_phase) || { parts: {} };
        parts = PARTS.filter(([k]) => peak.parts[k] > 0).map(([k, t]) => ({ n: peak.parts[k] / GB, c: partColour(k), title: `${t}: ${bytes(peak.parts[k])}` }));
      } else parts = [{ n: v, c: 'var(--ft-ink-3)' }];
    }
    let a = 0;
    fill(gauge, ...parts.map(p => {
      const b = a + p.n / max, i = h('i', { class: 'seg', title: p.title || p.t, vars: { a: Math.min(1, a), b: Math.min(1, b), c: tooMuch ? `color-mix(in srgb, var(--ft-bad) 62%, ${p.c})` : p.c } }, [p.t, p.s, p.k].find(t => t && b - a > 0.0145 * t.length + 0.012) || '');
      a = b;
      return i;
    }), over);
    gauge.setAttribute('aria-hidden', 'true');
    const bad = (f && f.limits && (f.limits[L.key] || {}).state === 'over') || tooMuch;
    say.classList.toggle('bad', !!bad);
    if (v === null) fill(say, form.refused ? '' : 'forecasting');
    else if (L.key === 'minutes') fill(say, h('b', { class: 'num' }, mmss(v)), ' forecast');
    else if (L.key === 'memory_gb') fill(say, h('b', { class: 'num' }, gb(v * GB)), ` peak, ${phaseName(f.memory.peak_phase, true)}`);
    else if (L.key === 'trainable') fill(say, h('b', { class: 'num' }, count(f.trainable.count)), f.trainable.count ? `, ${percent(v)} of the weights` : ': nothing is trained');
    else fill(say, h('b', { class: 'num' }, bytes(f.size.bytes)), f.size.exact === false ? ' on disk, about' : ' on disk');
    slider.setAttribute('aria-description', say.textContent);
  };
  const paint = () => { rescale(); place(); shown(); field(); segments(); };
  root.paint = paint;

  slider.addEventListener('input', () => {
    held = true;
    let v = Math.max(slider.value / N * max, L.part);
    if (L.key === 'minutes') { const unit = max <= 3 ? 1 / 60 : max <= 10 ? 1 / 12 : max <= 60 ? 0.25 : 1; v = Math.max(unit * (max <= 3 ? 5 : 1), Math.round(v / unit) * unit); v = +v.toFixed(6); }
    else v = +v.toPrecision(3);
    last = v;
    delete form.typed[path]; delete form.errors[path];
    form.set(path, v, 'slide');
    place(); shown(); field(); segments();
  });
  const release = () => { if (held) { held = false; paint(); } };
  slider.addEventListener('change', release); slider.addEventListener('blur', release);
  box.addEventListener('change', () => {
    if (box.checked) {
      const v = value();
      form.set(path, form.get(path) ?? (last !== L.start || v === null ? last : Math.max(L.start, +(v * 1.25).toPrecision(2))));
    } else { last = form.get(path) ?? last; form.set(path, undefined); }
    paint();
  });
  input.addEventListener('input', () => {
    const t = input.value.trim(), v = t === '' ? NaN : L.read(t);
    if (!isFinite(v)) return form.wrong(path, input.value, `“${t}” is not ${L.key === 'minutes' ? 'a time' : 'a number'}. Give for example ${L.example}${L.unit ? NB + L.unit : ''}, or clear the box for no limit.`);
    if (v <= 0) return form.wrong(path, input.value, `A limit must be above zero. Give for example ${L.example}${L.unit ? NB + L.unit : ''}, or clear the box for no limit.`);
    last = v; form.set(path, +v.toPrecision(9)); rescale(); place(); segments();
  });
  input.addEventListener('blur', field);
  input.addEventListener('keydown', e => { if (e.key === 'Enter') input.blur(); });
  form.bindError(path, input, err);
  return root;
}

/* a limit on work has no ruler here: steps, or tokens (examples) */
function workRow(form) {
  const box = h('input', { type: 'checkbox', class: 'ft-check' }), say = h('span', { class: 'say' }), err = h('span', { role: 'alert' });
  const input = h('input', { class: 'ft-in s n', 'aria-label': 'Limit on steps or tokens', inputmode: 'numeric' });
  const kind = h('select', { class: 'ft-in s ft-sel nr-kind', 'aria-label': 'What is counted' }, h('option', { value: 'steps' }, 'steps'), h('option', { value: 'tokens' }, 'tokens'));
  const set = h('span', { class: 'set' }), root = h('div', { class: 'ft-limit', 'data-limit': 'work' }, h('label', null, box, 'Work'), say, set, err);
  const which = () => (form.get('budget.tokens') !== undefined && form.get('budget.tokens') !== null ? 'tokens' : form.get('budget.steps') !== undefined && form.get('budget.steps') !== null ? 'steps' : null);
  let last = { steps: 200, tokens: 400000 };
  const write = v => { const k = kind.value, o = k === 'steps' ? 'tokens' : 'steps'; if (form.spec.budget[o] !== undefined) delete form.spec.budget[o]; form.set('budget.' + k, v); };
  root.paint = () => {
    const k = which(), f = form.forecast, task = (form.profile || {}).task, typed = 'budget.work' in form.typed;
    box.checked = !!k; root.classList.toggle('off', !k);
    if (k) kind.value = k;
    if (set.dataset.on !== String(!!k)) { set.dataset.on = String(!!k); fill(set, ...(k ? ['at most', input, kind] : ['no limit'])); }
    if (k && document.activeElement !== input) { input.value = typed ? form.typed['budget.work'] : count(form.get('budget.' + k)); input.style.width = Math.max(62, input.value.length * 7 + 14) + 'px'; }
    kind.lastChild.textContent = task && task !== 'causal-lm' ? 'examples' : 'tokens';
    fill(say, f && f.steps ? [h('b', { class: 'num' }, count(f.steps)), ` steps, ${fettle.count(f.tokens)} ${task && task !== 'causal-lm' ? 'examples' : 'tokens'}`] : f ? 'no training steps' : '');
  };
  const read = () => {
    const v = parseNumber(input.value);
    if (!(v > 0) || v !== Math.round(v)) return form.wrong('budget.work', input.value, 'Not a whole number above zero. Give for example 200, or clear the box for no limit.');
    form.clear('budget.work'); last[kind.value] = v; write(v);
  };
  input.addEventListener('input', read);
  kind.addEventListener('change', () => { write(last[kind.value]); root.paint(); });
  box.addEventListener('change', () => {
    form.clear('budget.work');
    if (box.checked) { const s = form.forecast && form.forecast.steps; if (s) last.steps = s; write(last[kind.value]); }
    else { delete form.spec.budget.steps; form.set('budget.tokens', undefined); }
    root.paint();
  });
  form.bindError('budget.work', input, err);
  for (const k of ['steps', 'tokens']) { const e = h('span', { role: 'alert' }); root.append(e); form.bindError('budget.' + k, input, e); }
  return root;
}

function energyRow(form) {
  const box = h('input', { type: 'checkbox', class: 'ft-check' }), say = h('span', { class: 'say' }), set = h('span', { class: 'set' }), err = h('span', { role: 'alert' });
  const input = h('input', { class: 'ft-in s n', 'aria-label': 'Energy limit in joules', inputmode: 'numeric' });
  const root = h('div', { class: 'ft-limit off', 'data-limit': 'joules' }, h('label', null, box, 'Energy'), say, set, err);
  root.paint = () => {
    const has = !!(form.boot.machine || {}).energy, v = form.get('budget.joules'), lim = ((form.forecast || {}).limits || {}).joules;
    box.disabled = !has && !v; box.checked = !!v; root.classList.toggle('off', !v);
    fill(say, v ? (lim && lim.reason) || 'metered while it runs' : has ? 'metered while it runs' : 'No energy counter on this machine');
    if (set.dataset.on !== String(!!v)) { set.dataset.on = String(!!v); fill(set, ...(v ? ['at most', input, 'J'] : has ? ['no limit'] : [])); }
    if (v && document.activeElement !== input) input.value = form.typed['budget.joules'] || plain(v);
  };
  input.addEventListener('input', () => { const v = parseNumber(input.value); if (v > 0) form.set('budget.joules', v); else form.wrong('budget.joules', input.value, 'Not a number above zero. Give for example 5000 J, or clear the box for no limit.'); });
  box.addEventListener('change', () => { form.set('budget.joules', box.checked ? 5000 : undefined); root.paint(); });
  form.bindError('budget.joules', input, err);
  return root;
}

/* clock phases with their colours: stages in turn, evaluation, everything else */
function times(f) {
  const rows = Array.isArray(f.seconds.phases) ? f.seconds.phases : Object.entries(f.seconds.phases || {}).map(([phase, seconds]) => ({ phase, seconds }));
  return rows.filter(r => r.seconds > 0).map(r => {
    const m = /^(\d+)\s/.exec(r.phase), name = phaseName(r.phase);
    if (m) return { ...r, c: `var(--ft-time-${(m[1] - 1) % 3 + 1})`, t: `${name} ${clock(r.seconds)}`, s: name, k: m[1] };
    return { ...r, c: /eval/i.test(r.phase) ? 'var(--ft-time-eval)' : 'var(--ft-time-other)', t: `${name} ${clock(r.seconds)}` };
  });
}
let methodNames = {};
function phaseName(p, sentence) {
  const m = /^(\d+)\s+(\S+)(.*)$/.exec(p || '');
  if (m) return sentence ? `in stage ${m[1]}` : `${m[1]} ${methodNames[m[2]] || words(m[2])}${m[3]}`;
  return sentence ? `in ${p}` : words(p || '');
}

function phases(form) {
  const grid = h('div', { class: 'ft-phases' }), legend = h('p', { class: 'ft-legend' }), how = h('span', { class: 'sub' });
  const root = h('div', { class: 'nr-phases' }, h('p', { class: 'ft-h' }, 'Memory by phase ', how), grid, legend);
  root.paint = () => {
    const f = form.forecast, lim = form.get('budget.memory_gb') || null;
    root.classList.toggle('stale', !f);
    if (!f || !f.memory) return;
    const rows = f.memory.phases || [], top = Math.max(...rows.map(r => r.total / GB), lim || 0) * (lim ? 1.12 : 1.05) || 1;
    const max = [0.2, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 200].find(v => v >= top) || nice(top);
    grid.style.setProperty('--lim', lim ? Math.min(1, lim / max) : 1.2);
    grid.classList.toggle('nolim', !lim);
    const used = new Set();
    const line = r => {
      let a = 0;
      const bits = PARTS.filter(([k]) => r.parts[k] > 0).map(([k, t]) => { used.add(k); const b = a + r.parts[k] / GB / max, i = h('i', { title: `${t}: ${bytes(r.parts[k])}`, vars: { a, b, c: partColour(k) } }); a = b; return i; });
      const peak = r.phase === f.memory.peak_phase, over = lim && r.total / GB > lim;
      return [h('span', { class: (peak ? 'peak' : 'mut') + ' ell' }, phaseName(r.phase)), h('span', { class: 'bar' }, ...bits), h('span', { class: `num r ${peak ? 'peak' : ''} ${over ? 'bad' : ''}` }, (r.total / GB).toFixed(2))];
    };
    const marks = [0, max / 2, max].map(v => [v / max, v === 0 ? '0' : plain(+v.toPrecision(3))]).filter(([p]) => !lim || p === 0 || Math.abs(p - lim / max) > (innerWidth <= 720 ? 0.26 : 0.19));
    if (lim && lim <= max) marks.push([lim / max, `limit ${lim.toFixed(2)}`, 1]);
    marks.sort((a, b) => a[0] - b[0]);
    fill(grid, ...rows.flatMap(line), h('span', { class: 'ax', 'aria-hidden': 'true' }, ...marks.map(([p, t, b]) => h('span', { class: b ? 'lim' + (p > 0.85 ? ' end' : '') : p === 1 ? 'end' : p === 0 ? 'beg' : '', vars: { p } }, t))));
    grid.setAttribute('role', 'img');
    grid.setAttribute('aria-label', 'Memory by phase: ' + rows.map(r => `${phaseName(r.phase)} ${bytes(r.total)}`).join(', '));
    fill(legend, ...PARTS.filter(([k]) => used.has(k)).map(([k, t]) => h('span', null, h('i', { vars: { c: partColour(k) } }), t)));
    how.textContent = (/cuda|gpu|alloc/i.test(f.memory.how || '') ? 'allocator, GB' : 'host RSS, GB'); how.title = f.memory.how || '';
  };
  return root;
}

fettle.parts.budget = function (form, panel) {
  methodNames = Object.fromEntries(form.boot.methods.map(m => [m.id, m.name]));
  const verdict = panel.querySelector('.ft-fits'), speed = panel.querySelector('.ft-head .sub'), body = panel.querySelector('.ft-body');
  const rows = [...LIMITS.map(L => limitRow(form, L)), workRow(form), energyRow(form)];
  const mem = phases(form), chosen = h('dl', { class: 'ft-why' }), why = h('div', null, h('p', { class: 'ft-h' }, 'Chosen for you'), chosen), change = h('div', { class: 'nr-change' });
  fill(body, ...rows, h('hr', { class: 'ft-rule' }), mem, h('hr', { class: 'ft-rule nr-why' }), why, change);
  const v = h('span', { class: 'v' }), text = h('span', { class: 'sm mut' });
  fill(verdict, v, text);
  const live = verdict;
  const use = c => { for (const [path, value] of Object.entries(c.patch || {})) { const p = path.replace(/\[(\d+)\]/g, '.$1'); delete form.typed[p]; form.set(p, value === null ? undefined : value, 'patch'); } form.tell('all'); form.tell('pipeline'); rows.forEach(r => r.paint()); };
  const paint = () => {
    const f = form.forecast, r = form.refused, typed = Object.keys(form.typed);
    rows.forEach(row => row.paint());
    mem.paint();
    let kind = '', ic = 'i-info', word = 'Forecast', said = 'asking the planner';
    if (typed.length) { kind = 'bad'; ic = 'i-cross'; word = 'Correct first'; said = form.errors[typed[0]] || ''; }
    else if (r) { kind = r.lost ? 'warn' : 'bad'; ic = r.lost ? 'i-warn' : 'i-cross'; word = r.lost ? 'No answer' : 'Refused'; said = r.text; }
    else if (form.spec && !form.spec.pipeline.length) { ic = 'i-info'; word = 'No stage yet'; said = 'Add a method to the pipeline.'; }
    else if (f) { [kind, ic, word] = STATES[f.verdict] || STATES[f.fits ? 'fits' : 'over']; said = (f.text || '').replace(/^(Fits, but tightly|Does not fit|Fits): (.)/, (_, a, b) => b.toUpperCase()); }
    const key = word + said;
    if (live.dataset.key !== key) {
      live.dataset.key = key; live.className = 'ft-fits ' + (kind === 'bad' ? 'no' : kind === 'warn' ? 'maybe' : kind === 'good' ? '' : 'wait');
      live.dataset.verdict = word; fill(v, icon(ic), word); text.textContent = said;
    }
    const lim = k => { const l = form.get('budget.' + k); return l === undefined || l === null ? null : l; };
    form.verdict = { icon: ic, word, kind, dock: f ? [lim('memory_gb') !== null ? `${(f.memory.peak_bytes / GB).toFixed(2)} of ${gb(lim('memory_gb') * GB)}` : gb(f.memory.peak_bytes), lim('minutes') !== null ? `${clock(f.seconds.total)} of ${mmss(lim('minutes'))} min` : `${clock(f.seconds.total)} min`] : [] };
    speed.textContent = f && f.milliseconds !== undefined && f.milliseconds !== null ? `from shapes, in ${Math.max(1, Math.round(f.milliseconds))}${NB}ms` : '';
    const c = (f && f.chosen) || [];
    why.hidden = !c.length; body.querySelector('.nr-why').hidden = !c.length && !(f && f.verdict === 'over');
    if (c.length) fill(chosen, ...c.flatMap(x => [h('dt', { class: 'num' }, said2(x)), h('dd', null, x.why || '')]));
    const first = f && f.verdict !== 'fits' && !typed.length ? (f.changes || [])[0] : null;
    change.hidden = !first;
    const old = change.dataset.key, now = first ? JSON.stringify(first) : '';
    if (old !== now) {
      change.dataset.key = now;
      if (first) fill(change, el('div', { class: 'ft-note warn' }, icon('i-warn'), el('span', { class: 'grow' }, el('b', {}, 'Smallest change that fits: '), first.text), button('Use it', null, () => use(first), 'nr-use')));
      else fill(change);
    }
  };
  const said2 = x => {
    const v = String(x.value), what = String(x.what || '').replace(/_/g, ' ');
    return v === 'true' || v === 'false' ? `${what} ${v === 'true' ? 'on' : 'off'}` : !what || v.includes(what) ? v : `${what} ${v}`;
  };
  form.on('forecast', paint).on('all', paint).on('profile', paint).on('errors', () => { if (form.spec) paint(); });
};
})();
