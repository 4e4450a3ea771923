/* Sweeps: the list and the form, or one sweep as it goes on. Which one, and the axes of its plot, are in the address. */
const F = fettle,
  h = F.el,
  root = element.querySelector('.sw'),
  $ = name => root.querySelector(`[data-${name}]`);
const front = new F.SweepFront($('front'), $('front-tools'), $('front-sub'), {
  get: () => ({ x: F.query.get('x'), y: F.query.get('y') }),
  set: v => F.query.set(v),
});
const best = new F.SweepBest($('best'), $('best-sub')),
  parallel = new F.SweepParallel($('par')),
  trials = new F.SweepTrials($('trials'), $('trials-tools'), $('trials-sub'));
let boot = null,
  setup = null,
  sweep = null,
  seen = null,
  timer = 0,
  turn = 0;
const chosen = () => Number(F.query.get('sweep')) || null;
const GLYPH = { running: 'running', finished: 'finished', stopped: 'stopped', failed: 'failed' };

async function guard(work) {
  try {
    $('trouble').replaceChildren();
    return await work();
  } catch (e) {
    if (!(e instanceof F.ServerError)) throw e;
    F.note($('trouble'), 'bad', e.text);
  }
}

function go(id) {
  F.query.set({ sweep: id, x: null, y: null, specs: null, clone: null });
  show();
}

/* ---------- the list and the form ---------- */
const counted = s =>
  ['complete', 'running', 'pruned', 'infeasible', 'failed', 'stopped']
    .filter(k => s.counts[k])
    .map(k => `${s.counts[k]} ${F.sweepWords[k].toLowerCase()}`);
function list(rows) {
  const note = h(
    'div',
    { class: 'ft-empty' },
    h('h3', {}, 'No sweeps yet'),
    h(
      'p',
      {},
      'A sweep runs one spec many times over a range of any of its fields and shows which settings are best. ',
      'Choose fields below; the forecast says how long it takes before you start.',
    ),
  );
  if (!rows.length) return F.replace($('list'), h('section', { class: 'ft-panel' }, note));
  const line = s =>
    h(
      'tr',
      {},
      h(
        'td',
        {},
        h(
          'a',
          {
            href: `/sweeps?sweep=${s.id}`,
            onclick: e => {
              if (e.ctrlKey || e.metaKey || e.shiftKey) return;
              e.preventDefault();
              go(s.id);
            },
          },
          h('b', {}, s.name),
        ),
      ),
      h('td', {}, F.state(GLYPH[s.status])),
      h(
        'td',
        { class: 'num' },
        `${Object.values(s.counts).reduce((a, b) => a + b, 0)} of ${s.trials}`,
        h('span', { class: 'dim' }, counted(s).length ? ` (${counted(s).join(', ')})` : ''),
      ),
      h('td', {}, s.objectives.map(F.sweepWord).join(', ')),
      h('td', { class: 'sw-over' }, s.over.join(', ') || 'list of specs'),
      h('td', {}, `${s.model} on ${typeof s.data === 'string' ? s.data : s.data?.source}`),
      h('td', { class: 'dim' }, s.on || 'this machine'),
      h('td', { class: 'num dim' }, F.ago(s.created)),
    );
  F.replace(
    $('list'),
    h(
      'section',
      { class: 'ft-panel' },
      h(
        'div',
        { class: 'ft-scroll' },
        h(
          'table',
          { class: 'ft-table' },
          h(
            'thead',
            {},
            h(
              'tr',
              {},
              ['Sweep', 'State', 'Trials', 'Objectives', 'Over', 'Model and data', 'Where', 'Started'].map(n =>
                h('th', { scope: 'col' }, n),
              ),
            ),
          ),
          h('tbody', {}, rows.map(line)),
        ),
      ),
    ),
  );
}
async function overview() {
  F.text($('title'), 'Sweeps');
  F.replace($('state'));
  F.text($('counts'), '');
  F.replace($('tools'));
  $('view').hidden = true;
  $('list').hidden = false;
  const found = await F.call(server, 'listing', { seen });
  if (chosen()) return;
  if (!found.same) {
    seen = found.mark;
    list(found.sweeps);
  }
  boot ||= await F.call(server, 'boot', {});
  setup ||= new F.SweepSetup($('setup'), server, { boot, started: go });
  let specs = null;
  try {
    specs = JSON.parse(F.query.get('specs'));
  } catch {
    F.note($('trouble'), 'bad', 'The list of specs in the address cannot be read. Choose the rows in Recommend again.');
  }
  setup.open({ run: F.query.get('clone'), specs: Array.isArray(specs) && specs.length ? specs : null });
}

/* ---------- one sweep ---------- */
const button = (icon, words, act, kind = '') =>
  h('button', { type: 'button', class: `ft-btn ${kind}`, onclick: act }, F.icon(icon), words);
function head(s) {
  F.text($('title'), s.name);
  const word = s.wish === 'stop' ? 'Stopping' : s.silent ? 'Waiting for its conductor' : null;
  F.replace($('state'), F.state(GLYPH[s.status], word));
  const parts = [`${s.trials.length} of ${s.plan.trials} trials`, ...counted(s)];
  if (F.finite(s.left) && s.status === 'running') parts.push(`about ${F.clock(s.left)} left`);
  if (s.plan.on) parts.push(`on ${s.plan.on}`);
  F.text($('counts'), parts.join(', '));
  const mark = [s.id, s.status, s.wish, s.silent, s.counts.complete > 0].join();
  if (mark !== head.mark) {
    head.mark = mark;
    const act = name => () =>
      guard(async () => {
        await F.call(server, name, { sweep: s.id }, { retry: false });
        seen = null;
        tick();
      });
    F.replace(
      $('tools'),
      s.status === 'running' && s.wish !== 'stop' ? button('stop', 'Stop', act('stop')) : null,
      ['stopped', 'failed'].includes(s.status) ? button('play', 'Resume', act('resume'), 'primary') : null,
      h('a', { class: 'ft-btn quiet', href: `/compare?q=tag:${s.tag}` }, F.icon('f-full'), 'Compare its runs'),
      button('copy', 'Copy as YAML', () => F.copy(sweep.yaml), 'quiet'),
      s.status !== 'running'
        ? button(
            'cross',
            'Forget',
            e => {
              if (F.confirm(e.currentTarget, 'Forget the sweep, keep its runs'))
                guard(async () => {
                  await F.call(server, 'delete', { sweep: s.id }, { retry: false });
                  go(null);
                });
            },
            'quiet',
          )
        : null,
      h(
        'a',
        {
          class: 'ft-btn quiet',
          href: '/sweeps',
          onclick: e => {
            if (e.ctrlKey || e.metaKey) return;
            e.preventDefault();
            go(null);
          },
        },
        'All sweeps',
      ),
    );
  }
  if (s.message) F.note($('trouble'), s.status === 'failed' ? 'bad' : 'info', s.message);
  else $('trouble').replaceChildren();
}
function paint(s) {
  sweep = s;
  $('list').hidden = $('setup').hidden = true;
  $('view').hidden = false;
  head(s);
  front.show(s);
  best.show(s);
  parallel.show(s);
  F.sweepImportance($('imp'), s);
  trials.show(s);
}
async function tick() {
  clearTimeout(timer);
  const own = ++turn,
    id = chosen();
  try {
    if (!id) {
      await overview();
    } else {
      const found = await F.call(server, 'status', { sweep: id, seen });
      if (own !== turn || chosen() !== id) return;
      if (!found.same) {
        seen = found.mark;
        paint(found);
      }
    }
  } catch (e) {
    if (!(e instanceof F.ServerError)) throw e;
    F.note($('trouble'), 'bad', e.text);
    if (id) $('view').hidden = true;
  }
  if (own !== turn) return;
  const idle = document.hidden || (id && sweep && sweep.status !== 'running');
  timer = setTimeout(tick, idle ? 5000 : id ? 1000 : 3000);
}
function show() {
  seen = null;
  head.mark = null;
  tick();
}
addEventListener('popstate', show);
document.addEventListener('visibilitychange', () => !document.hidden && tick());
show();
