/* Method cards: filtered by family and search, each with its paper, what it does, what it costs on this model, and the first
   thing that it cannot do. Adding goes to the pipeline strip. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, familyName, debounce, architecture } = fettle.form;
  const { whole: count, size: bytes, clock, icon, family: familyIcon } = fettle,
    fill = fettle.replace;
  const FIRST = 8;

  fettle.parts.searchText = m =>
    [m.id, m.name, m.title, m.summary, familyName(m.family), ...(m.cannot || []), ...(m.needs || [])].join(' ').toLowerCase();
  /* chips of the families present, with counts; `all` first */
  fettle.parts.familyChips = (methods, chosen, onpick) => {
    const present = [...new Set(methods.map(m => m.family))];
    const chips = [
      ['', 'All', methods.length],
      ...present.map(f => [f, familyName(f), methods.filter(m => m.family === f).length]),
    ].map(([f, t, n]) =>
      h(
        'button',
        {
          type: 'button',
          class: 'ft-chip',
          'data-f': f,
          'aria-pressed': String(f === chosen),
          onclick: () => {
            chips.forEach(c => c.setAttribute('aria-pressed', String(c.dataset.f === f)));
            onpick(f);
          },
        },
        f ? familyIcon(f, 's') : null,
        t + ' ',
        h('span', { class: 'n' }, String(n)),
      ),
    );
    return chips;
  };

  fettle.parts.methodCards = function (form, panel) {
    const chips = panel.querySelector('.ft-chips'),
      search = panel.querySelector('input'),
      body = panel.querySelector('.ft-body');
    const M = form.boot.methods,
      grid = h('div', { class: 'ft-cards' });
    const more = h('button', {
      type: 'button',
      class: 'ft-btn quiet nr-more-cards',
      onclick: () => {
        all = !all;
        build();
        if (!all) panel.scrollIntoView({ block: 'start' });
        const c = all && grid.children[FIRST];
        if (c) {
          const b = c.querySelector('button');
          if (b) b.focus();
        }
      },
    });
    const none = h('p', { class: 'dim sm' }),
      foot = h(
        'p',
        { class: 'row sm nr-cards-foot' },
        more,
        h('span', { class: 'dim' }, 'Times, sizes and counts on the cards are forecasts for this model, data and machine.'),
      );
    fill(body, grid, none, foot);
    let family = '',
      words_ = '',
      all = false,
      costs = {};
    fill(
      chips,
      ...fettle.parts.familyChips(M, family, f => {
        family = f;
        all = false;
        build();
      }),
    );
    search.placeholder = `Search ${M.length} methods`;
    search.addEventListener('input', () => {
      words_ = search.value.trim().toLowerCase();
      build();
    });

    const refusal = m => {
      const p = form.profile;
      if (!p) return '';
      if (m.refuses && m.refuses[p.architecture]) return `${architecture(p.architecture)}: ${m.refuses[p.architecture]}`;
      if (m.tasks && m.tasks.length && p.task && !m.tasks.includes(p.task)) return `Serves ${m.tasks.join(', ')}, not ${p.task}`;
      return '';
    };
    const cost = m => {
      const c = costs[m.id];
      if (!c) return '';
      if (c.error) return '';
      if (c.trainable) return `${count(c.trainable)} trainable`;
      const t = clock(c.seconds);
      if (c.before_bytes && c.after_bytes && Math.abs(c.before_bytes - c.after_bytes) / c.before_bytes > 0.001)
        return `${t}, ${bytes(c.before_bytes)} → ${bytes(c.after_bytes)}`;
      return `${t}, ${c.peak_bytes ? bytes(c.peak_bytes) : 'no training'}`;
    };
    const kind = m => (m.trains ? 'trains' : m.packs ? 'packs' : m.masks ? 'leaves zeros' : m.shrinks ? 'shrinks' : '');
    const card = m => {
      const stages = form.spec.pipeline.map((s, i) => (s.method === m.id ? i + 1 : 0)).filter(Boolean),
        no = refusal(m),
        c = costs[m.id];
      const add = h(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon nr-addcard',
          'aria-label': `Add ${m.name} to the pipeline`,
          title: no || `Add ${m.name} to the pipeline`,
          onclick: () => {
            const at = form.addStage(m.id);
            form.status(`${m.name} is stage ${at + 1}.`);
          },
        },
        icon('i-plus'),
      );
      add.disabled = !!no;
      const why = no || (c && c.error ? c.error : '') || (m.cannot || [])[0] || '';
      return h(
        'article',
        { class: 'ft-card' + (stages.length ? ' in' : '') + (no ? ' nr-no' : ''), 'data-id': m.id },
        h(
          'div',
          { class: 'top' },
          familyIcon(m.family),
          h('h3', { title: m.name }, h('a', { href: '/library?method=' + encodeURIComponent(m.id) }, m.name)),
          h('span', { class: 'grow' }),
          stages.length ? h('span', { class: 'ft-tag auto' }, 'stage ' + stages.join(', ')) : null,
          add,
        ),
        h('p', { class: 'paper', title: m.title }, m.title + (m.year ? `, ${m.year}` : '')),
        h('p', { class: 'does' }, m.summary),
        why ? h('p', { class: 'cannot' + (no ? ' warn' : '') }, icon('i-na', 's'), h('span', null, words1(why))) : null,
        h(
          'div',
          { class: 'foot' },
          h('span', { class: 'num' }, cost(m) || kind(m)),
          cost(m) && kind(m) ? h('span', { class: 'dim' }, kind(m)) : null,
        ),
      );
    };
    const words1 = s => (s ? s[0].toUpperCase() + s.slice(1).replace(/\.$/, '') : '');
    const build = () => {
      if (!form.spec) return;
      const inUse = new Map(form.spec.pipeline.map((s, i) => [s.method, i]));
      const found = M.filter(
        m =>
          (!family || m.family === family) && (!words_ || words_.split(/\s+/).every(w => fettle.parts.searchText(m).includes(w))),
      );
      found.sort((a, b) => (inUse.has(a.id) ? inUse.get(a.id) : 99) - (inUse.has(b.id) ? inUse.get(b.id) : 99));
      const few = !all && !words_ && found.length > FIRST ? found.slice(0, FIRST) : found;
      const focused = grid.contains(document.activeElement) ? document.activeElement.closest('[data-id]').dataset.id : null;
      fill(grid, ...few.map(card));
      if (focused) {
        const b = grid.querySelector(`[data-id="${CSS.escape(focused)}"] .nr-addcard`);
        if (b) b.focus({ preventScroll: true });
      }
      none.textContent = found.length
        ? ''
        : `No method has “${search.value.trim()}” in its name, paper or description. Clear the search to see all.`;
      none.hidden = !!found.length;
      const less = all && !words_ && found.length > FIRST;
      fill(more, icon('i-down-c'), less ? 'Show fewer' : `${found.length - few.length} more`);
      more.hidden = !less && few.length === found.length;
    };
    let asked = '';
    const price = debounce(async () => {
      if (!form.profile) return;
      const given = {
        model: form.spec.model,
        data: form.spec.data,
        task: form.spec.task,
        budget: form.spec.budget,
        training: form.spec.training,
        seed: 0,
      };
      const key = JSON.stringify(given);
      if (key === asked) return;
      asked = key;
      const got = await form.server.costs(given);
      if (!got.error) {
        costs = got;
        build();
      }
    }, 500);
    form
      .on('pipeline', build)
      .on('profile', () => {
        build();
        price();
      })
      .on('all', price)
      .on('change', (what, path) => {
        if (/^(model|data|budget|training|task)/.test(path)) price();
      });
  };
})();
