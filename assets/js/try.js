/* Try: one input through up to four variants. What is chosen lives in the URL; what came back is in `cards`. */
const F = fettle, NB = F.NB;
const root = element.querySelector('.ft-try');
const $ = s => root.querySelector(s);
const LETTERS = 'ABCD';
const MOST = 4;
const DEFAULTS = { seed: 0, temperature: 0.7, top_p: 0.95, new_tokens: 64 };

const S = {
  mode: F.query.get('task') === 'classify' ? 'classify' : 'generate',
  refs: (F.query.get('v') || '').split(',').filter(Boolean),
  prompt: F.query.get('p'), settings: { ...DEFAULTS }, item: F.query.get('item') === null ? null : +F.query.get('item') || 0,
  data: F.query.get('data'), image: null, found: null, blind: F.keep('try.blind', true), shade: F.keep('try.shade', true),
};
for (const k of Object.keys(DEFAULTS)) { const v = F.query.get(k); if (v !== null && v !== '' && isFinite(v)) S.settings[k] = +v; }
let boot = null, votes = null, cards = [], request = null, voted = undefined, polling = 0, warmed = false;

/* ---------- identity ---------- */
const PATHS = { circle: 'M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z', square: 'M-3.6-3.6H3.6V3.6H-3.6Z', diamond: 'M0-5 5 0 0 5-5 0Z', 'triangle-up': 'M0-5 4.6 3.6H-4.6Z', 'triangle-down': 'M0 5 4.6-3.6H-4.6Z' };
const BASE = { css: 'var(--ft-ink-2)', symbol: 'triangle-down', dash: 'solid' };
const look = v => v && v.slot !== null && v.slot !== undefined ? F.run(v.slot) : BASE;
const marker = v => F.svg('svg', { class: 'ft-mk', width: 10, height: 10, viewBox: '-5 -5 10 10', 'aria-hidden': 'true' }, F.svg('path', { d: PATHS[look(v).symbol], style: `fill:${look(v).css}` }));
const byRef = ref => boot.variants.find(v => v.ref === ref);
const chosen = () => S.refs.map(byRef).filter(Boolean);
const tasks = () => S.mode === 'generate' ? ['causal-lm'] : ['text-classification', 'image-classification'];
const task = () => (chosen()[0] || {}).task || tasks()[0];
const fits = v => S.mode === 'generate' ? v.task === 'causal-lm' : chosen().length ? v.task === task() : tasks().includes(v.task);

/* ---------- state in the URL ---------- */
const save = () => {
  const q = { task: S.mode === 'classify' ? 'classify' : null, v: S.refs.join(','), p: root.dataset.kind === 'image' ? null : S.prompt, item: S.mode === 'classify' ? S.item : null, data: S.mode === 'classify' ? S.data : null };
  for (const k of Object.keys(DEFAULTS)) q[k] = S.mode === 'generate' && S.settings[k] !== DEFAULTS[k] ? S.settings[k] : null;
  F.query.set(q);
};
const saveSoon = F.debounce(save, 250);

/* ---------- choosing variants ---------- */
/* the model on its own and the newest runs made from it: the comparison that one wants first */
const propose = () => {
  const can = boot.variants.filter(v => tasks().includes(v.task));
  const newest = can.find(v => v.kind === 'run');
  const base = can.find(v => v.kind === 'model' && (!newest || v.model === newest.model)) || can.find(v => v.kind === 'model');
  const runs = can.filter(v => v.kind === 'run' && (!base || v.model === base.model) && (!newest || v.task === newest.task)).slice(0, MOST - (base ? 1 : 0));
  return [base, ...runs].filter(Boolean).map(v => v.ref);
};
const pick = () => {
  const box = $('[data-pick]');
  const left = boot.variants.filter(v => fits(v) && !S.refs.includes(v.ref));
  const parts = [F.el('span', { class: 'dim' }, 'Variants')];
  for (const v of chosen()) parts.push(F.el('span', { class: 'one', title: v.text }, marker(v), F.el('span', {}, v.name),
    F.el('button', { type: 'button', class: 'ft-btn icon', 'aria-label': `Leave out ${v.name}`, onclick: () => { S.refs = S.refs.filter(r => r !== v.ref); changed(); $('[data-add]')?.focus(); } }, F.icon('cross', 's'))));
  if (chosen().length < MOST && left.length) {
    const list = F.el('select', { class: 'ft-in s ft-sel', 'data-add': true, 'aria-label': 'Add a variant' }, F.el('option', { value: '' }, 'Add a variant'),
      left.slice(0, 300).map(v => F.el('option', { value: v.ref }, `${v.name}: ${v.text}`)));
    list.addEventListener('change', () => { if (list.value) { S.refs.push(list.value); changed(); $('[data-add]')?.focus(); } });
    parts.push(list);
  } else if (chosen().length >= MOST) parts.push(F.el('span', { class: 'dim' }, 'four is the most that fit side by side'));
  F.replace(box, parts);
};

/* ---------- the input ---------- */
const NUMBERS = { seed: [0, 2 ** 31 - 1, true, 'Seed'], temperature: [0, 5, false, 'Temperature'], top_p: [0.01, 1, false, 'Top p'], new_tokens: [1, 4096, true, 'New tokens'] };
const refuse = text => text ? F.note($('[data-refusal]'), 'bad', text) : F.replace($('[data-refusal]'));
const readNumbers = () => {
  for (const input of root.querySelectorAll('[data-n]')) {
    const k = input.dataset.n, [low, high, whole, name] = NUMBERS[k], text = input.value.trim().replace(',', '.'), x = Number(text);
    const ok = text !== '' && isFinite(x) && x >= low && x <= high && (!whole || Number.isInteger(x));
    input.setAttribute('aria-invalid', !ok);
    if (!ok) { refuse(`${name} ${input.value || 'is empty'}: not a ${whole ? 'whole ' : ''}number from ${low} to ${high.toLocaleString('en-US')}. Choose one inside that range.`); return false; }
    S.settings[k] = x;
  }
  refuse('');
  return true;
};
const showItem = () => {
  const d = $('[data-image-text]'), img = $('[data-image]');
  if (root.dataset.kind === 'image') {
    const src = S.image ? S.image.address : S.found && S.found.image;
    img.hidden = !src;
    if (src) { img.src = src; img.alt = S.image ? 'Uploaded image' : `Evaluation item ${S.found.index}`; }
    F.text(d, S.image ? S.image.name : S.found ? `Item ${S.found.index + 1} of ${S.found.count.toLocaleString('en-US')} held-out items of ${S.data}; its label is ${S.found.label}.` : 'Choose an item of the evaluation data, or upload an image.');
  }
  const box = $('[data-items]');
  if (root.dataset.kind === 'text' && S.data) F.replace(box, F.el('button', { type: 'button', class: 'ft-chip', onclick: () => step(1) }, `Next held-out item of ${S.data}`),
    S.item !== null && S.found ? F.el('span', { class: 'sm mut' }, `item ${S.found.index + 1} of ${S.found.count.toLocaleString('en-US')}, label ${S.found.label}`) : null);
  else F.replace(box);
};
const load = async () => {
  if (S.item === null || !S.data) { S.found = null; return showItem(); }
  try {
    S.found = await F.call(server, 'item', { data: S.data, index: S.item, task: task() });
    if (S.found.text !== null && S.found.text !== undefined) { S.prompt = S.found.text; $('[data-prompt]').value = S.prompt; }
  } catch (e) { S.found = null; refuse(e.text); }
  showItem();
};
const step = async by => {
  S.image = null;
  S.item = S.item === null ? 0 : ((S.item + by) % (S.found ? S.found.count : 1e9) + (S.found ? S.found.count : 1e9)) % (S.found ? S.found.count : 1e9);
  await load(); save();
  if (cards.length && request === null) go();
};

/* ---------- cards ---------- */
const hidden = () => S.mode === 'generate' && S.blind && cards.length > 1 && voted === undefined;
const NONE = '\u2013';
const card = (v, i) => {
  const c = { v, i, tokens: [], text: '', given: '', figures: {}, state: 'wait', error: null, word: 'Waiting' };
  c.head = F.el('div', { style: 'min-width:0' });
  c.nums = F.el('div', { class: 'nums num' });
  c.out = F.el('p', { class: 'out', 'aria-live': 'off' });
  c.probs = F.el('div', { class: 'ft-probs' });
  c.body = F.el('div', { style: 'display:contents' });
  c.status = F.el('span', { class: 'row', style: 'min-width:0' });
  c.note = F.el('span', { class: 'dim ell' });
  c.copy = F.el('button', { type: 'button', class: 'ft-btn icon', 'aria-label': `Copy the text of ${LETTERS[i]}`, title: 'Copy the text', onclick: () => F.copy(c.given + c.text) }, F.icon('copy'));
  c.tag = F.el('span', { class: 'ft-tag auto', hidden: true }, 'your vote');
  c.root = F.el('article', { class: 'ft-panel ft-var', 'data-ref': v.ref, 'aria-label': `Variant ${LETTERS[i]}` },
    F.el('header', { class: 'ft-head' }, F.el('span', { class: 'let' }, LETTERS[i]), c.head, c.tag), c.nums, c.body, F.el('footer', {}, c.status, c.note, S.mode === 'generate' ? c.copy : null));
  return c;
};
const paintHead = c => {
  const secret = hidden();
  c.root.style.setProperty('--c', secret ? 'var(--ft-line-strong)' : look(c.v).css);
  F.replace(c.head, secret ? [F.el('h2', {}, `Variant ${LETTERS[c.i]}`), F.el('span', { class: 'sub' }, 'named after your vote')]
    : [F.el('h2', { class: 'row', style: 'gap:6px' }, marker(c.v), c.v.name), F.el('span', { class: 'sub', title: c.v.text }, c.v.text)]);
  const f = c.figures, one = (x, u, title) => F.el('span', { title }, F.el('b', {}, x), F.el('span', { class: 'u' }, u));
  const size = c.v.size_bytes ? F.sizeParts(c.v.size_bytes) : null, held = f.weight_bytes ? F.sizeParts(f.weight_bytes + (f.kv_bytes || 0)) : null;
  if (S.mode === 'generate') F.replace(c.nums, secret ? F.el('span', { class: 'dim' }, 'speed, memory and size after your vote') : [
    one(F.finite(f.tokens_per_second) ? F.fig(f.tokens_per_second) : NONE, 'tok/s', 'New tokens per second after the first'),
    one(held ? held[0] : NONE, held ? held[1] : 'MB', 'Weights and KV cache in memory'), size ? one(size[0], size[1], 'Stored size') : null,
    one(F.finite(f.nats) ? f.nats.toFixed(2) : NONE, 'nats/tok', 'Mean surprise of its own tokens, at temperature 1')]);
  else F.replace(c.nums, one(F.finite(f.first_ms) ? F.fig(f.first_ms) : NONE, 'ms', 'Time of one item, warm'), held ? one(held[0], held[1], 'Weights in memory') : null, size ? one(size[0], size[1], 'Stored size') : null);
  c.root.toggleAttribute('data-voted', voted !== undefined && voted === c.i);
  c.tag.hidden = !(voted !== undefined && voted === c.i);
};
const paintFoot = c => {
  const f = c.figures;
  let s = 'starting', words = c.word;
  if (c.error) { s = 'failed'; words = 'No result'; }
  else if (c.state === 'done') {
    s = f.stop === 'you' ? 'stopped' : 'finished';
    words = S.mode === 'classify' ? 'Classified' : f.stop === 'you' ? `Stopped at ${c.tokens.length} tokens`
      : `${c.tokens.length} tokens` + (hidden() ? '' : ` in ${F.fig(f.seconds)}${NB}s`) + ({ 'end of text': ', end of text', 'context full': ', context full' }[f.stop] || '');
  } else if (c.state === 'wait') s = 'queued';
  else if (c.state === 'going') s = 'running';
  F.replace(c.status, F.state(s, words));
  F.text(c.note, c.state === 'done' && !hidden() ? parts(c) : '');
  c.copy.disabled = !c.text;
};
/* where its tokens part from the variant that it follows the longest */
const parts = c => {
  let best = null;
  for (const o of cards) if (o !== c && o.i < c.i && o.tokens.length && c.tokens.length) {
    let n = 0;
    while (n < o.tokens.length && n < c.tokens.length && o.tokens[n][0] === c.tokens[n][0]) n++;
    if (n > 0 && (!best || n > best.n)) best = { n, o };
  }
  if (!best) return '';
  return best.n === c.tokens.length && best.n === best.o.tokens.length ? `the same as ${LETTERS[best.o.i]}` : `parts from ${LETTERS[best.o.i]} at token ${best.n + 1}`;
};
/* 1.2 nats: a token of probability 0.30; 6 nats: 0.0025 */
const shade = nats => nats < 1.2 ? 0 : Math.min(1, 0.25 + 0.75 * (nats - 1.2) / 4.8);
const span = ([, piece, nats]) => F.el('i', { style: shade(nats) ? `--s:${shade(nats).toFixed(2)}` : null, title: `${nats.toFixed(2)} nats, probability ${F.fig(Math.exp(-nats))}` }, piece);
const addTokens = (c, list) => {
  const low = c.out.scrollHeight - c.out.scrollTop - c.out.clientHeight < 30;
  const caret = c.out.querySelector('.caret') || F.el('span', { class: 'caret', 'aria-hidden': 'true' });
  for (const t of list) { c.tokens.push(t); c.text += t[1]; }
  caret.remove();
  c.out.append(...list.map(span), ...(c.state === 'done' ? [] : [caret]));
  if (low) c.out.scrollTop = c.out.scrollHeight;
};
const showError = c => F.note(c.body, 'bad', c.error);
const event = e => {
  if (e.s === 'end') {
    for (const c of cards) if (c.state !== 'done') { c.state = 'done'; c.error = e.error || c.error || 'The process stopped before this variant was done. Generate again.'; showError(c); paintFoot(c); }
    S.busy = e.busy;
    return;
  }
  const c = cards[e.v];
  if (!c) return;
  if (e.s === 'loading') { c.state = 'load'; c.word = 'Loading the weights'; }
  if (e.s === 'ready') { c.state = 'ready'; c.word = 'Loaded'; }
  if (e.s === 'error') { c.state = 'done'; c.error = e.error; showError(c); }
  const { v, t, s, p, ...figures } = e;
  Object.assign(c.figures, figures);
  if (s === 'done') { c.state = 'done'; c.out.querySelector('.caret')?.remove(); c.out.setAttribute('aria-live', 'polite'); }
  if (t) { c.state = 'going'; c.word = 'Writing'; addTokens(c, t); }
  if (p) showProbabilities(c, p);
  paintFoot(c);
  if (s) paintHead(c);
};
const showProbabilities = (c, p) => F.replace(c.probs, p.map(([name, x], k) => [
  F.el('span', { class: 'lab ' + (k ? '' : 'top'), title: name }, c.figures.truth === name ? F.icon('check', 's') : null, name),
  F.el('span', { class: 'bar' }, F.el('i', { style: `--v:${x}` })), F.el('span', { class: 'num r' }, F.percent(x))]));

/* ---------- a request ---------- */
const shuffle = a => { for (let i = a.length - 1; i > 0; i--) { const j = Math.floor(Math.random() * (i + 1)); [a[i], a[j]] = [a[j], a[i]]; } return a; };
const busyButton = on => { const b = $('[data-go]'); F.text($('[data-go-word]'), on ? 'Stop' : S.mode === 'generate' ? 'Generate' : 'Classify'); b.querySelector('use').setAttribute('href', on ? '#i-stop' : '#i-play'); b.classList.toggle('primary', !on); };
const go = async () => {
  if (request !== null) { if (request) F.call(server, 'cancel', { id: request }, { retry: false }).catch(() => {}); return; }
  if (S.mode === 'generate' && !readNumbers()) return;
  const variants = chosen();
  if (!variants.length) return refuse('No variant is chosen. Add one below.');
  const image = root.dataset.kind === 'image';
  S.prompt = $('[data-prompt]').value;
  if (!image && !S.prompt.trim()) return refuse(S.mode === 'generate' ? 'The prompt is empty. Write at least one word.' : 'The text is empty. Write at least one word.');
  if (image && !S.image && S.item === null) return refuse('No image is chosen. Take an item of the evaluation data or upload one.');
  refuse('');
  save();
  const order = S.mode === 'generate' && S.blind ? shuffle([...variants]) : variants;
  request = ''; voted = undefined;
  cards = order.map(card);
  for (const c of cards) {
    if (S.mode === 'generate') { c.given = S.prompt; c.out.append(F.el('span', { class: 'given' }, S.prompt)); c.body.append(c.out); } else c.body.append(c.probs);
    paintHead(c); paintFoot(c);
  }
  F.replace($('[data-vars]'), cards.map(c => c.root));
  paintVote(); paintSide(); busyButton(true);
  const sent = S.mode === 'generate' ? { prompt: S.prompt, settings: { ...S.settings } }
    : image ? (S.image ? { image: S.image.address } : { data: S.data, item: S.item }) : (S.found && S.found.text === S.prompt ? { data: S.data, item: S.item } : { text: S.prompt });
  S.sent = { ...sent, refs: order.map(v => v.ref), blind: S.mode === 'generate' && S.blind };
  const mine = ++polling;
  try {
    const started = await F.call(server, 'start', { mode: S.mode, refs: order.map(v => v.ref), ...sent }, { retry: false, timeout: 30000 });
    request = started.id;
    let cursor = 0, began = Date.now();
    for (;;) {
      const news = await F.call(server, 'since', { id: request, cursor });
      if (mine !== polling) return;
      cursor = news.cursor;
      for (const e of news.events) event(e);
      if (news.state === 'done') break;
      if (news.state === 'waiting' && Date.now() - began > 700) for (const c of cards) if (c.state === 'wait') { c.word = `Starting the process, ${Math.round((Date.now() - began) / 1000)}${NB}s`; paintFoot(c); }
      await F.sleep(news.events.length ? 60 : 100);
    }
  } catch (e) {
    if (e.field === 'variants' || e.field === 'variant') refuse(e.text);
    for (const c of cards) if (c.state !== 'done') { c.state = 'done'; c.error = e.text || String(e); showError(c); paintFoot(c); }
  } finally {
    request = null; busyButton(false);
    for (const c of cards) { paintHead(c); paintFoot(c); }
    paintVote(); paintSide();
  }
};

/* ---------- vote ---------- */
const ready = () => S.mode === 'generate' && cards.length > 1 && request === null && cards.filter(c => c.text).length > 1;
const canVote = () => ready() && voted === undefined;
const castVote = async winner => {
  if (!canVote()) return;
  const was = S.sent;
  voted = winner === 'skip' ? null : winner;
  for (const c of cards) { paintHead(c); paintFoot(c); }
  root.toggleAttribute('data-shaded', S.shade);
  paintVote(); paintSide();
  if (winner === 'skip') return;
  try { votes = await F.call(server, 'vote', { prompt: was.prompt, refs: was.refs, settings: was.settings, winner: winner === null ? null : winner, texts: cards.map(c => c.text), blind: was.blind }, { retry: false }); }
  catch (e) { F.toast(e.text, 'bad'); voted = undefined; }
  paintVote(); paintVotes();
};
const paintVote = () => {
  $('[data-vote-panel]').hidden = S.mode !== 'generate' || cards.length < 2;
  root.toggleAttribute('data-shaded', S.shade && !hidden());
  const can = canVote();
  const b = (words, winner, cls = '') => F.el('button', { type: 'button', class: `ft-btn v ${cls} ${voted !== undefined && voted === winner && winner !== 'skip' ? 'primary' : ''}`, disabled: !can && !(voted === winner), 'aria-pressed': voted === winner, onclick: () => castVote(winner) }, words);
  F.replace($('[data-vote]'), F.el('b', {}, 'Which is best?'), cards.map((c, i) => b(LETTERS[i], i)), b('Tie', null), can ? b('Skip', 'skip', 'quiet') : null,
    F.el('span', { class: 'sm mut' }, voted !== undefined ? (S.sent.blind ? 'Names are shown. Generate again for the next vote.' : 'Kept. Names were shown, so this vote is not counted as preference.')
      : request !== null ? 'You can vote when all have written.' : [F.el('span', { class: 'only-wide' }, 'Keys ', F.el('span', { class: 'ft-kbd' }, '1'), ' to ', F.el('span', { class: 'ft-kbd' }, String(cards.length)), '. '), S.sent && S.sent.blind ? 'Names appear after the vote; the order is shuffled each time.' : 'Votes with names shown are kept but not counted as preference.']),
    F.el('span', { class: 'grow' }), F.el('span', { class: 'sm mut num' }, `${(votes ? votes.total : 0).toLocaleString('en-US')}${NB}${votes && votes.total === 1 ? 'vote' : 'votes'} kept`));
};
const tableButton = (box, key, make) => F.el('button', { type: 'button', class: 'ft-btn icon', 'aria-label': 'Show as table', title: 'Show as table', 'aria-pressed': !!S[key], onclick: () => { S[key] = !S[key]; make(); } }, F.icon('table'));
const when = t => { const d = new Date(t * 1000), two = n => String(n).padStart(2, '0'), day = `${two(d.getHours())}:${two(d.getMinutes())}`; return d.toDateString() === new Date().toDateString() ? day : `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${day}`; };
const agrees = r => { const h = (r.extra || {}).held_out; return !h ? NONE : h.agrees ? 'yes' : `no, by ${F.fig(h.by)}${NB}${h.metric}`; };
const PREF = [{ name: 'Variant' }, { name: 'Votes won', r: true }, { name: 'Votes', r: true }, { name: 'Share', r: true, unit: '%' }, { name: 'From', r: true, unit: '%' }, { name: 'To', r: true, unit: '%' }];
const KEPT = [{ name: 'When' }, { name: 'Prompt' }, { name: 'Variants' }, { name: 'Vote' }, { name: 'Blind' }, { name: 'Seed' }, { name: 'Temperature' }, { name: 'Top p' }, { name: 'New tokens' }, { name: 'Texts' }];
const exportKept = async () => {
  const all = await F.call(server, 'every_vote', {});
  F.csv('comparisons.csv', KEPT, all.rows.map(r => { const s = (r.extra || {}).settings || {}; return [new Date(r.created * 1000).toISOString(), r.prompt, r.variants.map(v => v.name).join('; '), r.winner === null ? 'tie' : r.winner, (r.extra || {}).blind ? 'yes' : 'no', r.seed, s.temperature, s.top_p, s.new_tokens, JSON.stringify(r.texts)]; }));
};
const paintVotes = () => {
  if (!votes) return;
  const p = votes.preference, pct = x => (100 * x).toFixed(0);
  F.text($('[data-pref-sub]'), p.length ? 'share of blind votes won, 95 % interval' : '');
  const rows = p.map(e => [e.name, e.wins, e.n, pct(e.share), pct(e.low), pct(e.high)]);
  F.replace($('[data-pref-tools]'), p.length ? [tableButton($('[data-pref]'), 'prefTable', paintVotes), F.el('button', { type: 'button', class: 'ft-btn icon', 'aria-label': 'Download CSV', title: 'Download CSV', onclick: () => F.csv('preference.csv', PREF, rows) }, F.icon('down'))] : []);
  if (!p.length) F.replace($('[data-pref]'), F.el('p', { class: 'ft-none' }, 'No blind vote yet. Generate with two variants or more, then choose the best before their names are shown.'));
  else if (S.prefTable) F.replace($('[data-pref]'), F.table(PREF, rows));
  else F.replace($('[data-pref]'), F.el('div', { class: 'ft-pref' }, p.slice(0, 8).map(e => [
    F.el('span', { class: 'who', title: e.text }, marker(e), F.el('span', {}, e.name)),
    F.el('span', { class: 'scale', style: `--c:${look(e).css};--lo:${e.low};--hi:${e.high};--v:${e.share}`, role: 'img', 'aria-label': `${pct(e.share)} %, from ${pct(e.low)} to ${pct(e.high)} %` }, F.el('i', { class: 'iv' }), marker(e)),
    F.el('span', { class: 'num mut r' }, `${e.wins} of ${e.n}`)]), F.el('span'), F.el('span', { class: 'axis num' }, ['0', '25', '50', '75', `100${NB}%`].map(t => F.el('span', {}, t))), F.el('span')));
  F.text($('[data-kept-sub]'), votes.total ? `${votes.total.toLocaleString('en-US')}, all with text, settings and vote` : '');
  F.replace($('[data-kept-tools]'), votes.total ? F.el('button', { type: 'button', class: 'ft-btn quiet', style: 'height:26px', onclick: exportKept }, F.icon('down'), 'Export') : []);
  if (!votes.rows.length) return F.replace($('[data-kept]'), F.el('p', { class: 'ft-none', style: 'padding:10px 12px' }, 'Nothing kept yet. Each vote keeps the prompt, the settings and all texts.'));
  F.replace($('[data-kept]'), F.el('table', { class: 'ft-table kept' }, F.el('thead', {}, F.el('tr', {}, ['When', 'Prompt', 'Variants', 'Vote'].map(t => F.el('th', { scope: 'col' }, t)), F.el('th', { scope: 'col', class: 'r', title: 'Whether the variant with the best held-out figure won' }, 'Held-out figure agrees'), F.el('th', { scope: 'col', class: 'r' }, 'Seed'))),
    F.el('tbody', {}, votes.rows.slice(0, S.more ? undefined : 8).map(r => F.el('tr', {}, F.el('td', { class: 'dim num' }, when(r.created)), F.el('td', { class: 'mono p', title: r.prompt }, r.prompt), F.el('td', { class: 'mut vs' }, r.variants.map(v => v.name).join(', ')),
      F.el('td', { class: 'b' }, r.winner === null ? 'tie' : r.winner), F.el('td', { class: 'r mut' }, agrees(r)), F.el('td', { class: 'r num' }, String(r.seed)))))),
    votes.rows.length > 8 && !S.more ? F.el('div', { style: 'padding:4px 6px' }, F.el('button', { type: 'button', class: 'ft-btn quiet', onclick: () => { S.more = true; paintVotes(); } }, `Show ${Math.min(50, votes.total)}`)) : null);
};

/* ---------- speed and memory of what is on the page ---------- */
/* tokens/s over windows of a twelfth of the text: single tokens are too noisy to read */
const speedOf = c => {
  const t = c.tokens.slice(1), w = Math.max(4, Math.ceil(t.length / 12)), out = [];
  for (let i = 0; i + w <= t.length; i += w) out.push([(c.figures.prompt_tokens || 0) + i + 1 + w / 2, 1000 * w / t.slice(i, i + w).reduce((s, x) => s + x[3], 0)]);
  return out;
};
const paintSide = () => {
  const done = cards.filter(c => c.state === 'done' && !c.error && c.figures.tokens_per_second), show = done.length && !hidden() && request === null;
  const say = text => F.el('p', { class: 'ft-none', style: 'padding:6px 8px' }, text);
  const wait = cards.length && hidden() ? 'Shown after your vote.' : 'Shown when variants have written.';
  F.replace($('[data-speed-tools]'), show ? tableButton(null, 'speedTable', paintSide) : []);
  F.replace($('[data-memory-tools]'), show ? tableButton(null, 'memoryTable', paintSide) : []);
  if (!show) { F.replace($('[data-speed]'), say(wait)); F.replace($('[data-memory]'), say(wait)); return; }
  const lines = done.map(c => ({ c, pts: speedOf(c) }));
  if (S.speedTable) F.replace($('[data-speed]'), F.table([{ name: 'Variant' }, { name: 'Length', unit: 'tokens', r: true }, { name: 'Speed', unit: 'tokens/s', r: true, f: v => F.fig(v) }], lines.flatMap(l => l.pts.map(p => [l.c.v.name, Math.round(p[0]), p[1]]))));
  else F.replace($('[data-speed]'), lines.some(l => l.pts.length > 1) ? speedPlot(lines.filter(l => l.pts.length > 1), $('[data-speed]').clientWidth - 10) : say('Too few tokens for a curve. Ask for more new tokens.'), S.busy ? F.el('p', { class: 'mi dim', style: 'padding:0 8px 4px' }, 'A run computes on this machine: speeds are lower than when it is idle.') : null);
  const mb = b => F.fig(b / 1e6), most = Math.max(...done.map(c => c.figures.weight_bytes + (c.figures.kv_bytes || 0)));
  const rss = Math.max(...done.map(c => c.figures.rss_bytes || 0));
  if (S.memoryTable) F.replace($('[data-memory]'), F.table([{ name: 'Variant' }, { name: 'Weights', unit: 'MB', r: true }, { name: 'KV cache', unit: 'MB', r: true }], done.map(c => [c.v.name, mb(c.figures.weight_bytes), F.finite(c.figures.kv_bytes) ? mb(c.figures.kv_bytes) : 'no figure'])));
  else F.replace($('[data-memory]'), F.el('div', { class: 'ft-bars' }, done.map(c => [F.el('b', { title: c.v.name }, LETTERS[c.i]), F.el('span', { class: 'ft-stack' }, F.el('i', { style: `width:${95 * c.figures.weight_bytes / most}%;background:var(--ft-part-weights)` }), F.el('i', { style: `width:${95 * (c.figures.kv_bytes || 0) / most}%;background:var(--ft-part-kv)` })), F.num(mb(c.figures.weight_bytes + (c.figures.kv_bytes || 0)), 'MB', 'num r')])),
    F.el('p', { class: 'ft-key' }, F.el('span', {}, F.el('i', { class: 'swatch', style: '--c:var(--ft-part-weights)' }), 'Weights'), F.el('span', {}, F.el('i', { class: 'swatch', style: '--c:var(--ft-part-kv)' }), 'KV cache at the end')),
    F.el('p', { class: 'mi dim' }, `Process and libraries: ${F.gb(rss)} for all together`));
};
const nice = x => { const p = 10 ** Math.floor(Math.log10(x)); return [1, 2, 2.5, 5, 10].find(m => m * p >= x) * p; };
const DASH = { solid: null, '6px,2px': '6 2', '2px,2px': '2 2', '8px,2px,2px,2px': '8 2 2 2', '4px,3px': '4 3' };
const speedPlot = (lines, w) => {
  const h = 152, m = { l: 38, r: 26, t: 12, b: 22 }, all = lines.flatMap(l => l.pts), top = nice(Math.max(...all.map(p => p[1])) / 3) * 3;
  const x1 = Math.max(...all.map(p => p[0])), x0 = Math.min(...all.map(p => p[0])), X = v => m.l + (v - x0) / Math.max(1, x1 - x0) * (w - m.l - m.r), Y = v => h - m.b - v / top * (h - m.t - m.b);
  const svg = F.svg('svg', { class: 'ft-try-plot', width: w, height: h, role: 'img', 'aria-label': 'Decode speed at each length: ' + lines.map(l => `${LETTERS[l.c.i]} ${F.fig(l.c.figures.tokens_per_second)} tokens/s`).join(', ') });
  for (let i = 0; i <= 3; i++) { const v = top / 3 * i; svg.append(F.svg('line', { class: i ? 'grid' : 'axis', x1: m.l, x2: w - m.r, y1: Y(v) + .5, y2: Y(v) + .5 }), F.svg('text', { x: m.l - 6, y: Y(v) + 4, 'text-anchor': 'end' }, v ? F.fig(v) : '0')); }
  for (const v of [x0, (x0 + x1) / 2, x1]) svg.append(F.svg('text', { x: X(v), y: h - 7, 'text-anchor': 'middle' }, String(Math.round(v))));
  const ends = [];
  for (const l of lines) {
    const k = look(l.c.v), last = l.pts[l.pts.length - 1];
    svg.append(F.svg('path', { d: l.pts.map((p, i) => (i ? 'L' : 'M') + X(p[0]).toFixed(1) + ' ' + Y(p[1]).toFixed(1)).join(''), fill: 'none', style: `stroke:${k.css};stroke-width:1.75`, 'stroke-dasharray': DASH[k.dash] }));
    for (const p of l.pts) svg.append(F.svg('path', { d: PATHS[k.symbol], transform: `translate(${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}) scale(.65)`, style: `fill:${k.css}` }));
    ends.push({ x: X(last[0]) + 7, y: Y(last[1]), t: LETTERS[l.c.i] });
  }
  ends.sort((a, b) => a.y - b.y);
  for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + 13);
  for (const e of ends) svg.append(F.svg('text', { class: 'halo', x: e.x, y: e.y + 4 }, e.t));
  return svg;
};

/* ---------- the page ---------- */
const empty = (title, words, ...actions) => F.el('div', { class: 'ft-panel', style: 'grid-column:1/-1' }, F.el('div', { class: 'ft-empty' }, F.el('h3', {}, title), F.el('p', {}, words), F.el('div', { class: 'row wrap' }, actions)));
const link = (words, href, cls = '') => F.el('a', { class: `ft-btn ${cls}`, href }, words);
const idle = () => {
  if (cards.length) return;
  const box = $('[data-vars]'), can = boot.variants.filter(v => tasks().includes(v.task)), runs = can.filter(v => v.kind === 'run');
  if (!can.length) F.replace(box, empty(S.mode === 'generate' ? 'No language model yet' : 'No classifier yet', S.mode === 'generate' ? 'Nothing here generates text. Start a run on a language model; its result appears here when it is done.' : 'Nothing here classifies. Train a classifier, for example on digits: it takes a minute or two.', link('Set up a run', '/', 'primary')));
  else if (!runs.length) F.replace(box, empty('Only the base model so far', `You can ${S.mode === 'generate' ? 'generate with' : 'use'} it now. When a run has finished, its result stands beside it here.`, link('Start a run', '/', 'primary')));
  else F.replace(box);
};
const changed = () => {
  S.refs = S.refs.filter((r, i, a) => byRef(r) && a.indexOf(r) === i).slice(0, MOST);
  const of = task();
  S.refs = S.refs.filter(r => S.mode === 'generate' ? byRef(r).task === 'causal-lm' : byRef(r).task === of);
  root.dataset.task = S.mode;
  root.dataset.kind = of === 'image-classification' && S.mode === 'classify' ? 'image' : 'text';
  for (const b of root.querySelectorAll('[data-mode] button')) b.setAttribute('aria-pressed', b.dataset.v === S.mode);
  F.text($('[data-lede]'), S.mode === 'generate' ? 'The same prompt and seed through up to four variants' : 'The same item through up to four variants');
  $('[data-prompt]').setAttribute('aria-label', S.mode === 'generate' ? 'Prompt' : 'Text to classify');
  const data = (chosen().find(v => v.data) || boot.variants.find(v => v.data && v.task === of && chosen().some(c => c.model === v.model)) || {}).data || (root.dataset.kind === 'image' ? 'digits' : null);
  if (S.mode === 'classify' && (!S.data || data)) S.data = data || S.data;
  if (S.mode === 'classify' && S.item === null && root.dataset.kind === 'image' && S.data) { S.item = 0; load(); }
  busyButton(request !== null);
  pick(); idle(); showItem(); save();
};
const setMode = m => { if (m === S.mode) return; polling++; request = null; S.mode = m; cards = []; voted = undefined; S.found = null; S.image = null; S.item = null; S.refs = propose(); F.replace($('[data-vars]')); refuse(''); if (m === 'generate') { S.prompt = boot.prompts[0][1]; $('[data-prompt]').value = S.prompt; } else { S.prompt = ''; $('[data-prompt]').value = ''; } changed(); paintVote(); paintSide(); };
const quote = s => "'" + String(s).replace(/'/g, "'\\''") + "'";
const command = () => {
  const names = chosen().map(v => quote(v.name)).join(' ');
  if (S.mode === 'generate') return `${boot.command} ${names} --prompt ${quote($('[data-prompt]').value)} --seed ${S.settings.seed} --temperature ${S.settings.temperature} --top-p ${S.settings.top_p} --new-tokens ${S.settings.new_tokens}`;
  return root.dataset.kind === 'image' || (S.item !== null && S.found) ? `${boot.command} ${names} --data ${quote(S.data)} --item ${S.item || 0}` : `${boot.command} ${names} --text ${quote($('[data-prompt]').value)}`;
};
const warm = () => { if (!warmed && !document.hidden) { warmed = true; F.call(server, 'warm', {}, { retry: false }).catch(() => { warmed = false; }); } };

$('[data-mode]').addEventListener('click', e => { const b = e.target.closest('button'); if (b) setMode(b.dataset.v); });
$('[data-go]').addEventListener('click', go);
$('[data-go]').addEventListener('pointerenter', warm);
$('[data-prompt]').addEventListener('focus', warm);
$('[data-prompt]').addEventListener('input', () => { S.prompt = $('[data-prompt]').value; if (S.mode === 'classify') S.item = null; saveSoon(); });
for (const i of root.querySelectorAll('[data-n]')) { i.value = S.settings[i.dataset.n]; i.addEventListener('change', () => { if (readNumbers()) save(); }); }
$('[data-blind]').checked = S.blind; $('[data-shade]').checked = S.shade;
$('[data-blind]').addEventListener('change', e => { S.blind = e.target.checked; F.keep.set('try.blind', S.blind); if (!S.blind) for (const c of cards) { paintHead(c); paintFoot(c); } if (S.sent && !S.blind && voted === undefined) S.sent.blind = false; paintVote(); paintSide(); });
$('[data-shade]').addEventListener('change', e => { S.shade = e.target.checked; F.keep.set('try.shade', S.shade); paintVote(); });
$('[data-command]').addEventListener('click', () => F.copy(command(), 'Command copied'));
$('[data-share]').addEventListener('click', () => { save(); F.copy(location.href, 'Link copied'); });
for (const b of root.querySelectorAll('[data-step]')) b.addEventListener('click', () => step(+b.dataset.step));
$('[data-pick-file]').addEventListener('click', () => $('[data-file]').click());
$('[data-file]').addEventListener('change', e => {
  const file = e.target.files[0];
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => { S.image = { address: reader.result, name: file.name }; S.item = null; refuse(''); showItem(); };
  reader.readAsDataURL(file); e.target.value = '';
});
root.addEventListener('keydown', e => { if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) { e.preventDefault(); if (request === null) go(); } });
/* in the capture phase: the app bar uses the same keys to change pages */
const keys = e => {
  if (!element.isConnected) return removeEventListener('keydown', keys, true);
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest?.('input, textarea, select, [contenteditable]') || !/^[1-4]$/.test(e.key)) return;
  if (!ready()) return;
  e.stopPropagation(); e.preventDefault();
  if (canVote() && +e.key <= cards.length) castVote(+e.key - 1);
};
addEventListener('keydown', keys, true);
let width = 0;
new ResizeObserver(() => { const w = $('[data-speed]').clientWidth; if (Math.abs(w - width) > 2) { width = w; if (cards.length) paintSide(); } }).observe($('[data-speed]'));

(async () => {
  root.dataset.task = S.mode;
  try { boot = await F.call(server, 'open_page', {}); } catch (e) { return F.note($('[data-vars]'), 'bad', e.text); }
  votes = boot.votes;
  for (const ref of S.refs) if (!byRef(ref)) try { boot.variants.push(await F.call(server, 'variant', { ref }, { retry: false })); } catch (e) { F.toast(e.text, 'bad'); }
  S.refs = S.refs.map(r => byRef(r) ? r : (boot.variants.find(v => v.name === r) || {}).ref).filter(Boolean);
  /* a link from another page names runs only: their base model stands beside them */
  const linked = (F.query.get('runs') || '').split(',').filter(Boolean).map(r => byRef(`run:${r}`) || boot.variants.find(v => v.name === r)).filter(Boolean);
  if (!S.refs.length && linked.length) {
    S.mode = linked[0].task === 'causal-lm' ? 'generate' : 'classify';
    const base = boot.variants.find(v => v.kind === 'model' && v.model === linked[0].model);
    S.refs = [linked.length < MOST ? base : null, ...linked].filter(Boolean).map(v => v.ref);
  }
  F.query.set({ runs: null });
  if (!S.refs.length) S.refs = propose();
  if (S.prompt === null || S.prompt === undefined) S.prompt = S.mode === 'generate' ? boot.prompts[0][1] : '';
  $('[data-prompt]').value = S.prompt;
  F.replace($('[data-prompts]'), F.el('span', { class: 'dim' }, 'Prompts'), boot.prompts.map(([name, text]) => F.el('button', { type: 'button', class: 'ft-chip', onclick: () => { S.prompt = text; $('[data-prompt]').value = text; save(); $('[data-prompt]').focus(); } }, name)));
  changed(); paintVotes(); paintSide(); paintVote();
  if (S.item !== null) load();
})();
