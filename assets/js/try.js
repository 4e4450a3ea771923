/* Try: one input through up to four variants. What is chosen lives in the URL; try_cards.js holds the columns,
   try_side.js what is counted below them. */
const F = fettle;
const root = element.querySelector('.ft-try');
const $ = s => root.querySelector(s);
const { marker } = F.variant;
const MOST = 4;
const DEFAULTS = { seed: 0, temperature: 0.7, top_p: 0.95, new_tokens: 64 };
const Q = F.query.get;

/* item: number of an evaluation item, null when the text is the person's own; voted: place of the winner, null for a tie or a skip */
const S = {
  mode: Q('task') === 'classify' ? 'classify' : 'generate',
  refs: (Q('v') || '').split(',').filter(Boolean),
  prompt: Q('p'),
  settings: { ...DEFAULTS },
  item: Q('item') === null ? null : Math.max(0, +Q('item') || 0),
  data: Q('data'),
  image: null,
  found: null,
  blind: F.keep('try.blind', true),
  shade: F.keep('try.shade', true),
  voted: undefined,
  sent: null,
  busy: false,
};
for (const k of Object.keys(DEFAULTS)) if (Q(k) && isFinite(Q(k))) S.settings[k] = +Q(k);
let boot = null,
  request = null,
  polling = 0,
  warmed = false;
const cards = new F.TryCards($('[data-vars]'), S);
const side = new F.TrySide($, cards, () => F.call(server, 'every_vote', {}));
const vote = new F.TryVote($, cards, S, {
  busy: () => request !== null,
  paint: () => paint(),
  keep: given => F.call(server, 'vote', given, { retry: false }),
  kept: found => side.votes(found),
});

/* ---------- what can be chosen ---------- */
const byRef = ref => boot.variants.find(v => v.ref === ref);
const chosen = () => S.refs.map(byRef).filter(Boolean);
const tasks = () => (S.mode === 'generate' ? ['causal-lm'] : ['text-classification', 'image-classification']);
const task = () => (chosen()[0] || {}).task || tasks()[0];
const image = () => S.mode === 'classify' && task() === 'image-classification';
const fits = v => (S.mode === 'classify' && chosen().length ? v.task === task() : tasks().includes(v.task));
const save = () => {
  const classify = S.mode === 'classify';
  const q = {
    task: classify ? 'classify' : null,
    v: S.refs.join(','),
    p: image() ? null : S.prompt,
    item: classify ? S.item : null,
    data: classify ? S.data : null,
  };
  for (const k of Object.keys(DEFAULTS)) q[k] = !classify && S.settings[k] !== DEFAULTS[k] ? S.settings[k] : null;
  F.query.set(q);
};
const saveSoon = F.debounce(save, 250);
/* the model on its own and the newest runs made from it: the comparison that one wants first */
const propose = () => {
  const can = boot.variants.filter(v => tasks().includes(v.task)),
    newest = can.find(v => v.kind === 'run');
  const base =
    can.find(v => v.kind === 'model' && (!newest || v.model === newest.model)) ||
    (newest ? null : can.find(v => v.kind === 'model'));
  const like = v => v.kind === 'run' && v.task === newest.task && v.model === newest.model;
  return [base, ...can.filter(v => newest && like(v)).slice(0, MOST - (base ? 1 : 0))].filter(Boolean).map(v => v.ref);
};
/* a link from another page names runs only: their base model stands beside them */
const linked = () => {
  const runs = (Q('runs') || '')
    .split(',')
    .filter(Boolean)
    .map(r => byRef(`run:${r}`) || boot.variants.find(v => v.name === r))
    .filter(Boolean);
  F.query.set({ runs: null });
  if (!runs.length || S.refs.length) return;
  S.mode = runs[0].task === 'causal-lm' ? 'generate' : 'classify';
  const base = boot.variants.find(v => v.kind === 'model' && v.model === runs[0].model);
  S.refs = [runs.length < MOST ? base : null, ...runs].filter(Boolean).map(v => v.ref);
};
const focusAdd = () => $('[data-add]')?.focus();
const pick = () => {
  const left = boot.variants.filter(v => fits(v) && !S.refs.includes(v.ref)),
    parts = [F.el('span', { class: 'dim' }, 'Variants')];
  for (const v of chosen()) {
    const drop = () => {
      S.refs = S.refs.filter(r => r !== v.ref);
      changed();
      focusAdd();
    };
    parts.push(
      F.el(
        'span',
        { class: 'one', title: v.text },
        marker(v),
        F.el('span', {}, v.name),
        F.el(
          'button',
          { type: 'button', class: 'ft-btn icon', 'aria-label': `Leave out ${v.name}`, onclick: drop },
          F.icon('cross', 's'),
        ),
      ),
    );
  }
  if (chosen().length >= MOST) parts.push(F.el('span', { class: 'dim' }, 'four is the most that fit side by side'));
  else if (left.length) {
    const list = F.el(
      'select',
      { class: 'ft-in s ft-sel', 'data-add': true, 'aria-label': 'Add a variant' },
      F.el('option', { value: '' }, 'Add a variant'),
      left.slice(0, 300).map(v => F.el('option', { value: v.ref }, `${v.name}: ${v.text}`)),
    );
    list.addEventListener('change', () => {
      if (list.value) {
        S.refs.push(list.value);
        changed();
        focusAdd();
      }
    });
    parts.push(list);
  }
  F.replace($('[data-pick]'), parts);
};

/* ---------- the input ---------- */
const input = F.tryInput({
  root,
  server,
  state: S,
  chosen: () => chosen(),
  image: () => image(),
  task: () => task(),
  moved: () => {
    save();
    if (cards.length && request === null) go();
  },
});
const { refuse, readNumbers, showItem, load, step, setPrompt } = input;

/* ---------- a request ---------- */
const shuffle = a => {
  for (let i = a.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [a[i], a[j]] = [a[j], a[i]];
  }
  return a;
};
const goButton = on => {
  const b = $('[data-go]');
  F.text($('[data-go-word]'), on ? 'Stop' : S.mode === 'generate' ? 'Generate' : 'Classify');
  b.querySelector('use').setAttribute('href', on ? '#i-stop' : '#i-play');
  b.classList.toggle('primary', !on);
};
const paint = () => {
  cards.paint();
  vote.paint();
  root.toggleAttribute('data-shaded', S.shade && !cards.hidden());
  side.measured(request === null, S.busy);
};
const go = async () => {
  if (request !== null) {
    if (request) F.call(server, 'cancel', { id: request }, { retry: false }).catch(() => {});
    return;
  }
  S.prompt = $('[data-prompt]').value;
  if (S.mode === 'generate' && !readNumbers()) return;
  if (input.problem()) return refuse(input.problem());
  refuse('');
  save();
  const blind = S.mode === 'generate' && S.blind,
    order = blind ? shuffle(chosen()) : chosen(),
    refs = order.map(v => v.ref),
    mine = ++polling;
  request = '';
  S.voted = undefined;
  S.sent = { ...input.payload(), refs, blind };
  cards.reset(order, S.prompt);
  goButton(true);
  paint();
  try {
    request = (await F.call(server, 'start', { mode: S.mode, ...S.sent }, { retry: false, timeout: 30000 })).id;
    await follow(mine);
  } catch (e) {
    if (mine !== polling) return;
    if (e.field) refuse(e.text);
    cards.fail(e.text || String(e));
  } finally {
    if (mine === polling) {
      request = null;
      goButton(false);
      paint();
    }
  }
};
const follow = async mine => {
  const began = Date.now();
  for (let cursor = 0; ;) {
    const news = await F.call(server, 'since', { id: request, cursor });
    if (mine !== polling) return;
    cursor = news.cursor;
    for (const e of news.events) {
      cards.event(e);
      if (e.s === 'end') S.busy = e.busy;
    }
    if (news.state === 'done') return;
    if (news.state === 'waiting' && Date.now() - began > 700) cards.waiting(Math.round((Date.now() - began) / 1000));
    await F.sleep(news.events.length ? 60 : 100);
  }
};

/* ---------- the page ---------- */
const idle = () => {
  if (cards.length) return;
  const can = boot.variants.filter(v => tasks().includes(v.task)),
    write = S.mode === 'generate';
  const say = (title, words, act) =>
    F.replace(
      $('[data-vars]'),
      F.el(
        'div',
        { class: 'ft-panel', style: 'grid-column:1/-1' },
        F.el(
          'div',
          { class: 'ft-empty' },
          F.el('h3', {}, title),
          F.el('p', {}, words),
          F.el('a', { class: 'ft-btn primary', href: '/' }, act),
        ),
      ),
    );
  if (!can.length && write)
    say(
      'No language model yet',
      'Nothing here generates text. Start a run on a language model; its result appears here when it is done.',
      'Set up a run',
    );
  else if (!can.length)
    say(
      'No classifier yet',
      'Nothing here classifies. Train a classifier, for example on digits; its result appears here when it is done.',
      'Set up a run',
    );
  else if (!can.some(v => v.kind === 'run'))
    say(
      'Only the base model so far',
      `You can ${write ? 'generate with' : 'use'} it now. When a run has finished, its result stands beside it here.`,
      'Start a run',
    );
  else F.replace($('[data-vars]'));
};
const changed = () => {
  S.refs = S.refs.filter((r, i, all) => byRef(r) && all.indexOf(r) === i && tasks().includes(byRef(r).task)).slice(0, MOST);
  const of = task();
  if (S.mode === 'classify') S.refs = S.refs.filter(r => byRef(r).task === of);
  root.dataset.task = S.mode;
  root.dataset.kind = image() ? 'image' : 'text';
  for (const b of $('[data-mode]').children) b.setAttribute('aria-pressed', b.dataset.v === S.mode);
  F.text(
    $('[data-lede]'),
    S.mode === 'generate' ? 'The same prompt and seed through up to four variants' : 'The same item through up to four variants',
  );
  $('[data-prompt]').setAttribute('aria-label', S.mode === 'generate' ? 'Prompt' : 'Text to classify');
  if (S.mode === 'classify') {
    const own = chosen().find(v => v.data),
      kin = boot.variants.find(v => v.data && v.task === of && chosen().some(c => c.model === v.model));
    S.data = (own || kin || {}).data || S.data || (image() ? 'digits' : null);
    if (image() && S.item === null && !S.image && S.data) {
      S.item = 0;
      load();
    }
  }
  /* the command line has no way to name an image yet */
  $('[data-command]').hidden = image();
  goButton(request !== null);
  pick();
  idle();
  showItem();
  save();
};
const setMode = mode => {
  if (mode === S.mode) return;
  polling++;
  request = null;
  Object.assign(S, { mode, voted: undefined, found: null, image: null, item: null });
  cards.clear();
  S.refs = propose();
  refuse('');
  setPrompt(mode === 'generate' ? boot.prompts[0][1] : '');
  changed();
  paint();
};
const quote = s => "'" + String(s).replace(/'/g, "'\\''") + "'";
const command = () => {
  const s = S.settings,
    parts = [boot.command, ...chosen().map(v => quote(v.name)), '--prompt', quote($('[data-prompt]').value)];
  if (S.mode === 'generate') {
    parts.push(`--seed ${s.seed} --temperature ${s.temperature} --new-tokens ${s.new_tokens}`);
    if (s.top_p !== DEFAULTS.top_p) parts.push(`--top-p ${s.top_p}`);
  }
  return parts.join(' ');
};
const warm = () => {
  if (!warmed) {
    warmed = true;
    F.call(server, 'warm', {}, { retry: false }).catch(() => {
      warmed = false;
    });
  }
};

const on = (selector, event, act) => {
  for (const node of root.querySelectorAll(selector)) node.addEventListener(event, act);
};
on('[data-mode] button', 'click', e => setMode(e.currentTarget.dataset.v));
on('[data-go]', 'click', go);
on('[data-go]', 'pointerenter', warm);
on('[data-prompt]', 'focus', warm);
on('[data-prompt]', 'input', () => {
  S.prompt = $('[data-prompt]').value;
  if (S.mode === 'classify') {
    S.item = null;
    showItem();
  }
  saveSoon();
});
on('[data-n]', 'change', () => {
  if (readNumbers()) save();
});
/* who looks at the names before voting has not voted blind */
on('[data-blind]', 'change', e => {
  S.blind = e.target.checked;
  F.keep.set('try.blind', S.blind);
  if (S.sent && !S.blind && S.voted === undefined) S.sent.blind = false;
  paint();
});
on('[data-shade]', 'change', e => {
  S.shade = e.target.checked;
  F.keep.set('try.shade', S.shade);
  paint();
});
on('[data-command]', 'click', () => F.copy(command(), 'Command copied'));
on('[data-share]', 'click', () => {
  save();
  F.copy(location.href, 'Link copied');
});
on('[data-step]', 'click', e => step(+e.currentTarget.dataset.step));
on('[data-pick-file]', 'click', () => $('[data-file]').click());
on('[data-file]', 'change', e => {
  if (e.target.files[0]) input.readFile(e.target.files[0]);
  e.target.value = '';
});
root.addEventListener('keydown', e => {
  if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) {
    e.preventDefault();
    if (request === null) go();
  }
});
/* in the capture phase: the app bar uses the same keys to change pages */
const keys = e => {
  if (!element.isConnected) return removeEventListener('keydown', keys, true);
  if (
    e.ctrlKey ||
    e.metaKey ||
    e.altKey ||
    e.target.closest?.('input, textarea, select, [contenteditable]') ||
    !/^[1-4]$/.test(e.key) ||
    !vote.ready
  )
    return;
  e.stopPropagation();
  e.preventDefault();
  if (+e.key <= cards.length) vote.cast(+e.key - 1);
};
addEventListener('keydown', keys, true);

(async () => {
  root.dataset.task = S.mode;
  $('[data-blind]').checked = S.blind;
  $('[data-shade]').checked = S.shade;
  for (const i of root.querySelectorAll('[data-n]')) i.value = S.settings[i.dataset.n];
  try {
    boot = await F.call(server, 'open_page', {});
  } catch (e) {
    return F.note($('[data-vars]'), 'bad', e.text);
  }
  vote.total = boot.votes.total;
  for (const ref of S.refs) {
    if (byRef(ref)) continue;
    try {
      boot.variants.push(await F.call(server, 'variant', { ref }, { retry: false }));
    } catch (e) {
      F.toast(e.text, 'bad');
    }
  }
  S.refs = S.refs.map(r => (byRef(r) || boot.variants.find(v => v.name === r) || {}).ref).filter(Boolean);
  linked();
  if (!S.refs.length) S.refs = propose();
  setPrompt(S.prompt ?? (S.mode === 'generate' ? boot.prompts[0][1] : ''));
  const chip = ([name, text]) =>
    F.el(
      'button',
      {
        type: 'button',
        class: 'ft-chip',
        onclick: () => {
          setPrompt(text);
          save();
          $('[data-prompt]').focus();
        },
      },
      name,
    );
  F.replace($('[data-prompts]'), F.el('span', { class: 'dim' }, 'Prompts'), boot.prompts.map(chip));
  changed();
  side.votes(boot.votes);
  paint();
  if (S.item !== null) load();
})();
