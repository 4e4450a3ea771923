/* Live: which run, its state and what can be done, and what to say when there is no run or it failed. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];
  const button = (words, icon, cls, onclick, title) =>
    F.el('button', { type: 'button', class: `ft-btn ${cls}`, onclick, title }, icon ? F.icon(icon) : null, words);
  const WORD = {
    failed: e =>
      ({
        'gpu memory': 'Out of memory',
        memory: 'Out of memory',
        'memory budget': 'Over its memory',
        'disk full': 'Disk full',
        'not finite': 'Not finite',
        input: 'Refused',
        killed: 'Killed',
        ended: 'Ended',
        crash: 'Crashed',
        'missing file': 'File missing',
        'hub unreachable': 'Hub unreachable',
      })[e?.kind] || 'Failed',
  };

  F.livePanels.push((root, bus) => {
    const part = n => root.querySelector(`[data-part="${n}"]`),
      t = n => root.querySelector(`[data-t="${n}"]`);
    const guard = async f => {
      try {
        await f();
      } catch (e) {
        F.toast(e.text || String(e), 'bad');
      }
    };

    /* ---------- the runs to switch between ---------- */
    const nav = root.querySelector('.ft-runs-nav');
    let rows = [],
      listed = '';
    const list = async () => {
      if (document.hidden) return;
      try {
        rows = await bus.call('recent', { run: bus.run?.id }, { retry: false });
      } catch {
        return;
      }
      const stamp = JSON.stringify(rows.map(r => [r.id, r.name, r.status])) + bus.run?.id;
      if (stamp === listed) return;
      listed = stamp;
      nav.hidden = rows.length < 2;
      let place = 0;
      F.replace(
        nav,
        rows.map(r => {
          if (r.status === 'queued') place++;
          return F.el(
            'a',
            {
              class: 'ft-runchip',
              href: `/live?run=${r.id}`,
              'aria-current': r.id === bus.run?.id ? 'true' : null,
              title: F.stateWord(r.status),
              style: `--c:${F.run(r.slot).css}`,
              onclick: e => {
                if (e.metaKey || e.ctrlKey) return;
                e.preventDefault();
                root.dispatchEvent(new CustomEvent('fettle-open', { detail: r.id }));
              },
            },
            F.el('i', { class: 'swatch' }),
            F.el('span', {}, r.name),
            F.state(r.status, r.status === 'queued' ? F.ordinal(place) : ' ', 'bare'),
          );
        }),
      );
      nav.querySelector('[aria-current]')?.scrollIntoView({ block: 'nearest', inline: 'nearest' });
    };
    bus.on('open', list);
    bus.on('state', list);
    const again = setInterval(() => {
      if (!root.isConnected) return clearInterval(again);
      list();
    }, 4000);

    /* ---------- state and actions ---------- */
    const words = r => {
      if (r.wish === 'stop' && bus.live) return 'Stopping';
      if (r.wish === 'pause' && bus.live && r.status !== 'paused') return 'Pausing';
      if (r.status === 'queued') return bus.place ? `Queued, ${F.ordinal(bus.place)}` : 'Queued';
      if (r.status === 'failed') return WORD.failed(r.error);
      return F.stateWord(r.status);
    };
    const checkpoint = () => {
      for (let i = bus.events.length - 1; i >= 0; i--) if (bus.events[i].kind === 'checkpoint') return bus.events[i];
      return null;
    };
    const resumeWords = () => {
      const c = checkpoint();
      const at = c ? (c.data.used_total ?? bus.at(c.t)) : null;
      return c ? `Resume from ${F.clock(at)}` : 'Resume';
    };
    const actions = r => {
      const s = r.status,
        run = what => () => guard(() => bus.act(what)),
        list = [];
      const clone = button('Clone settings', 'copy', s === 'failed' ? 'primary' : '', () => F.go('/', { clone: r.id }));
      if (s === 'queued') list.push(button('Take out of the queue', 'stop', 'danger', run('stop')));
      else if (s === 'starting' || s === 'running') {
        if (r.wish === 'stop') {
          const b = button('Stop at once', 'stop', 'danger', () => {
            if (F.confirm(b, 'Lose what is since the last checkpoint')) guard(() => bus.act('kill'));
          });
          list.push(b);
        } else {
          const p = button('Pause', 'pause', '', run('pause'));
          p.disabled = r.wish === 'pause' || s === 'starting';
          list.push(p, button('Stop', 'stop', 'danger', run('stop'), 'Stop at the next step; it is evaluated and kept'));
        }
      } else if (s === 'paused')
        list.push(button('Resume', 'play', 'primary', run('resume')), button('Stop', 'stop', 'danger', run('stop')));
      else if (s === 'lost') list.push(button(resumeWords(), 'play', 'primary', run('resume')), clone);
      else if (s === 'failed') list.push(clone, button(resumeWords(), 'play', '', run('resume')));
      else
        list.push(
          button('Try it', 'play', 'primary', () => F.go('/try', { runs: r.id })),
          button('Compare', null, '', () => F.go('/compare', { runs: r.id })),
          clone,
          s === 'stopped' ? button(resumeWords(), 'play', '', run('resume')) : null,
        );
      return list;
    };
    const beat = r => {
      const s = Math.max(0, Date.now() / 1000 + bus.skew - (r.heartbeat || r.started));
      return s < 60 ? `${F.fixed(s, 1)}${F.NB}s ago` : F.ago(r.heartbeat || r.started);
    };
    let last = '';
    const head = () => {
      const r = bus.run;
      if (!r) return;
      root.querySelector('.ft-live').style.setProperty('--c', F.run(r.slot).css);
      F.text(t('name'), r.name);
      const d = r.spec?.data,
        budget = bus.limits;
      F.text(t('what'), r.spec ? `${r.spec.model} on ${typeof d === 'string' ? d : d?.source}, seed ${r.spec.seed ?? 0}` : '');
      const ended = F.liveEnded(r.status);
      F.text(
        t('when'),
        ended
          ? `${F.stateWord(r.status)} ${r.ended ? F.moment(r.ended) : ''}${r.seconds ? `, ran ${F.clock(r.seconds)}` : ''}`
          : r.status === 'queued'
            ? `Settings frozen ${F.moment(r.queued || r.created)}`
            : r.status === 'paused'
              ? `Paused at ${F.clock(bus.now())}`
              : r.started
                ? `Started ${F.moment(r.started)}, heartbeat ${beat(r)}`
                : '',
      );
      const stamp = JSON.stringify([r.id, r.status, r.wish, bus.place, checkpoint()?.id, r.error?.kind]);
      if (stamp === last) return;
      last = stamp;
      F.replace(t('state'), F.state(r.status, words(r), 'box'));
      F.replace(
        t('actions'),
        ['failed', 'lost'].includes(r.status) ? null : actions(r),
        button('Copy as YAML', 'copy', 'quiet opt', () =>
          guard(async () => F.copy((await bus.call('as_yaml', { run: r.id }, { retry: false })).yaml, 'Settings copied as YAML')),
        ),
        button('Copy as command', 'copy', 'quiet opt', () =>
          guard(async () => F.copy((await bus.call('as_yaml', { run: r.id }, { retry: false })).command, 'Copied as a command')),
        ),
        button('Settings', null, 'quiet opt', settings),
      );
      F.replace(t('dockactions'), actions(r).slice(0, 2));
      doctor(r);
    };
    /* an alarm of the training stays in the run's head until it is over: nobody reads a list of events for it */
    const alarm = () => {
      const box = t('alarm'),
        e = bus.events.findLast(x => x.kind === 'alarm'),
        on = !!(e && e.data && !e.data.over);
      box.hidden = !on;
      if (!on) return (box.dataset.id = '');
      if (box.dataset.id === String(e.id)) return;
      box.dataset.id = String(e.id);
      const [first, ...rest] = e.text.split(': ');
      F.replace(box, F.note(null, 'warn', F.el('b', {}, `${first}. `), rest.join(': ')));
    };
    const settings = () =>
      guard(async () => {
        const box = t('settings');
        if (!box.hidden) {
          box.hidden = true;
          return;
        }
        const { yaml } = await bus.call('as_yaml', { run: bus.run.id }, { retry: false });
        F.replace(box, F.el('pre', { class: 'ft-code' }, yaml));
        box.hidden = false;
      });
    const dock = () => {
      const r = bus.run;
      part('dock').hidden = !r;
      if (!r) return;
      const left = bus.left;
      F.replace(
        t('dock'),
        r.status === 'running' && F.finite(left)
          ? [t('alarm').hidden ? null : F.icon('warn', 'ft-alarmed'), F.el('b', {}, F.clock(left)), F.el('span', { class: 'sm mut' }, ` left, ${F.clock(bus.now())} used`)]
          : F.state(r.status, words(r)),
      );
    };

    /* ---------- what went wrong ---------- */
    const doctor = r => {
      const box = part('doctor'),
        e = r.error || {};
      box.hidden = !['failed', 'lost', 'queued'].includes(r.status);
      box.dataset.kind = r.status;
      if (box.hidden) return;
      if (r.status === 'queued') {
        F.replace(
          box,
          F.el(
            'div',
            { class: 'ft-empty' },
            F.el(
              'h3',
              {},
              bus.place > 1 ? `${bus.place - 1} ${bus.place === 2 ? 'run is' : 'runs are'} before this one` : 'This run is next',
            ),
            F.el(
              'p',
              {},
              'It starts by itself when the device is free, with the settings as they were when it was queued. ' +
                'This page then shows its curves; it need not stay open.',
            ),
          ),
        );
        return;
      }
      const tail = (e.log && e.log.length ? e.log : bus.log.trim().split('\n').slice(-12)).join('\n');
      const pre = F.el(
        'pre',
        { class: 'ft-log ft-doctorlog', tabindex: 0, hidden: true },
        tail + (e.trace ? '\n\n' + e.trace : ''),
      );
      const lost = r.status === 'lost';
      const more = button('Last lines of the log', null, 'quiet', () => {
        pre.hidden = !pre.hidden;
      });
      F.replace(
        box,
        F.el(
          'div',
          { class: 'ft-body' },
          F.el(
            'p',
            { class: 'ft-cause' },
            F.el('b', {}, e.cause || (lost ? 'The worker ended without saying why.' : 'The run failed.')),
            ' ',
            e.remedy || '',
          ),
          lost
            ? F.el(
                'p',
                { class: 'sm mut' },
                `Everything up to ${F.clock(bus.lastT)} is recorded. `,
                checkpoint()
                  ? 'Resuming repeats what came after the last checkpoint and then continues the same curve.'
                  : 'There is no checkpoint yet: resuming begins anew.',
              )
            : F.el(
                'p',
                { class: 'sm mut' },
                `Ended ${r.ended ? F.moment(r.ended) : ''}${bus.now() ? ` at ${F.clock(bus.now())}` : ''}. `,
                'Nothing that was recorded is lost.',
              ),
          F.el('div', { class: 'row wrap ft-doctoract' }, actions(r), tail ? more : null),
          pre,
        ),
      );
    };

    /* ---------- nothing to show ---------- */
    const empty = () => {
      const box = part('empty');
      box.hidden = !!bus.run;
      if (bus.run) return;
      const start = button('Start the example', 'play', 'primary', () =>
        guard(async () => {
          start.disabled = true;
          try {
            const { id } = await bus.call('start_example', {}, { retry: false });
            dispatchEvent(new Event('fettle-changed'));
            root.dispatchEvent(new CustomEvent('fettle-open', { detail: id }));
          } finally {
            start.disabled = false;
          }
        }),
      );
      F.replace(
        box,
        F.el(
          'div',
          { class: 'ft-empty' },
          F.el('h3', {}, 'Nothing is running'),
          F.el(
            'p',
            {},
            'Start the example and watch it here: a small language model is pruned by half, repaired with LoRA, stored in int8. ' +
              'It takes about two minutes and needs no network.',
          ),
          F.el('div', { class: 'row wrap' }, start, F.el('a', { class: 'ft-btn', href: '/' }, 'Set up your own')),
        ),
      );
    };

    bus.on('open', () => {
      last = '';
      alarm();
      t('settings').hidden = true;
      part('head').hidden = !bus.run;
      empty();
      if (!bus.run) {
        part('doctor').hidden = part('readouts').hidden = part('grid').hidden = true;
      } else {
        part('readouts').hidden = part('grid').hidden = false;
        head();
      }
      dock();
    });
    bus.on('tick', (b, d) => {
      if (d.events) alarm();
      head();
      dock();
    });
    bus.on('idle', () => {
      head();
      dock();
    });

    const rename = t('rename'),
      title = t('name');
    const finish = save => {
      if (rename.hidden) return;
      rename.hidden = true;
      title.hidden = false;
      const name = rename.value.trim();
      if (save && name && name !== bus.run.name)
        guard(async () => {
          await bus.act('rename', { name });
          listed = '';
          list();
        });
    };
    rename.addEventListener('keydown', e => {
      if (e.key === 'Enter') finish(true);
      else if (e.key === 'Escape') finish(false);
    });
    rename.addEventListener('blur', () => finish(true));
    return {
      do(what) {
        if (what === 'rename') {
          rename.value = bus.run.name;
          rename.hidden = false;
          title.hidden = true;
          rename.focus();
          rename.select();
        }
      },
    };
  });
})();
