/* Which data: bundled, a file or folder, or a hub id; columns, a few rows, lengths, counts and warnings. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, NB, segmented, button } = fettle.form;
  const { whole: count, count: short, fig, svg } = fettle,
    fill = fettle.replace;

  /* histogram of lengths: edges one longer than counts; drawn once per answer, in ink of the tokens */
  function histogram(at, lengths, unit) {
    const draw = () => {
      const w = Math.floor(at.clientWidth),
        H = 86,
        m = { l: 36, r: 8, t: 13, b: 22 };
      if (w < 60) return;
      const { edges, counts } = lengths,
        top = Math.max(...counts, 1),
        x0 = edges[0],
        x1 = edges[edges.length - 1];
      const X = v => m.l + ((v - x0) / (x1 - x0 || 1)) * (w - m.l - m.r),
        Y = v => H - m.b - (v / top) * (H - m.t - m.b);
      const text = (x, y, t, a = 'middle', c = '') => svg('text', { x, y, 'text-anchor': a, class: c }, t);
      const s = svg('svg', {
        width: w,
        height: H,
        viewBox: `0 0 ${w} ${H}`,
        role: 'img',
        'aria-label': `Histogram of length in ${unit}: mean ${fig(lengths.mean)}, longest ${count(lengths.longest)}`,
      });
      const step = fettle.form.nice(top / 2.2);
      for (let v = 0; v <= top; v += step)
        s.append(
          svg('line', { x1: m.l, x2: w - m.r, y1: Y(v), y2: Y(v), class: 'grid' }),
          text(m.l - 6, Y(v) + 3.5, short(v).replace(NB, ' '), 'end'),
        );
      counts.forEach((n, i) => {
        if (n)
          s.append(
            svg('rect', {
              x: X(edges[i]) + 0.5,
              width: Math.max(1, X(edges[i + 1]) - X(edges[i]) - 1),
              y: Y(n),
              height: Math.max(0.5, Y(0) - Y(n)),
              style: 'fill:var(--ft-part-activations)',
            }),
          );
      });
      s.append(svg('line', { x1: m.l, x2: w - m.r, y1: H - m.b + 0.5, y2: H - m.b + 0.5, class: 'axis' }));
      const last = lengths.longest > x1 ? ' or more ' : ' ',
        wide = w > 420;
      for (const k of wide ? [0, 1, 2, 3, 4] : [0, 2, 4]) {
        const v = x0 + ((x1 - x0) * k) / 4;
        s.append(
          svg('line', { x1: X(v), x2: X(v), y1: H - m.b, y2: H - m.b + 4, class: 'axis' }),
          k === 3 && last.length > 1
            ? ''
            : text(
                X(v),
                H - m.b + 15,
                k === 4 ? count(v) + last + unit : count(v),
                k === 4 ? 'end' : k === 0 ? 'start' : 'middle',
              ),
        );
      }
      if (lengths.mean > x0 && lengths.mean < x1) {
        const x = X(lengths.mean);
        s.append(
          svg('line', { x1: x, x2: x, y1: m.t - 2, y2: H - m.b, style: 'stroke:var(--ft-ink-2);stroke-dasharray:2 2' }),
          text(x + 4, m.t - 4, `mean ${fig(lengths.mean)}`, x > w - 90 ? 'end' : 'start', 'ink2 halo'),
        );
      }
      fill(at, s);
    };
    draw();
    if (!at._watch) {
      let last = at.clientWidth;
      at._watch = new ResizeObserver(() => {
        if (Math.abs(at.clientWidth - last) > 1) {
          last = at.clientWidth;
          at._draw();
        }
      });
      at._watch.observe(at);
    }
    at._draw = draw;
  }
  fettle.parts.dataPicker = function (form, panel) {
    const body = panel.querySelector('.ft-body'),
      tools = panel.querySelector('.ft-tools'),
      sub = panel.querySelector('.ft-head .sub');
    const pick = h('div', { class: 'row wrap nr-datapick' }),
      err = h('p', { role: 'alert' }),
      facts = h('div', { class: 'nr-facts' });
    fill(body, pick, err, facts);
    let where = 'bundled',
      asked = '',
      seen = null;
    const kept = () => (form.view.data = form.view.data || {});
    const source = () => (typeof form.spec.data === 'string' ? form.spec.data : (form.spec.data || {}).source || '');
    const part = k => (typeof form.spec.data === 'string' ? null : ((form.spec.data || {})[k] ?? null));
    const of = d =>
      form.boot.data.some(x => x.id === d)
        ? 'bundled'
        : /^[~./]|^[A-Za-z]:\\|\.(csv|tsv|jsonl?|parquet|txt)$/i.test(d)
          ? 'file'
          : 'hub';
    const seg = segmented(
      'Where the data comes from',
      [
        ['bundled', 'Bundled'],
        ['file', 'File or folder'],
        ['hub', 'Hub'],
      ],
      where,
      v => {
        where = v;
        build();
        const i = pick.querySelector('input, select');
        if (i) i.focus({ preventScroll: true });
      },
    );
    fill(tools, seg);
    const choose = d => {
      kept()[where] = d;
      form.spec.data = d;
      form.clear('data');
      form.changed('value', 'data');
      load();
      form.pair('data');
    };
    const tune = (k, v) => {
      const d = typeof form.spec.data === 'string' ? { source: form.spec.data } : { ...form.spec.data };
      if (v === null || v === '') delete d[k];
      else d[k] = v;
      form.spec.data = Object.keys(d).length === 1 ? d.source : d;
      form.clear('data.' + k);
      form.clear('data');
      form.changed('value', 'data.' + k);
      load();
    };
    const columns = h('span', { class: 'nr-cols row wrap' });
    const build = () => {
      seg.set(where);
      if (where === 'bundled') {
        const s = h(
          'select',
          { class: 'ft-in ft-sel nr-dataset', 'aria-label': 'Data set', onchange: () => choose(s.value) },
          ...form.boot.data.map(d => h('option', { value: d.id }, d.id)),
        );
        if (of(source()) === 'bundled') s.value = source();
        else {
          s.prepend(h('option', { value: '', disabled: true }, 'Choose a data set'));
          s.value = '';
        }
        fill(pick, s, columns);
        form.bindError('data', s, err);
      } else {
        const input = h('input', {
          class: 'ft-in',
          'aria-label': where === 'file' ? 'File or folder with the data' : 'Hub id of the data',
          placeholder: where === 'file' ? '/path/to/data.csv, .jsonl, .parquet, .txt or an image folder' : 'owner/name, or words to search for',
          value: kept()[where] || '',
          spellcheck: 'false',
          autocomplete: 'off',
        });
        const read = () => {
          const t = input.value.trim();
          kept()[where] = input.value;
          if (t) choose(t);
          else
            form.wrong(
              'data',
              input.value,
              where === 'file'
                ? 'No file yet. Give a csv, jsonl, parquet or txt file, or a folder of images by class.'
                : 'No hub id yet. Give one such as owner/name.',
            );
        };
        input.addEventListener('change', read);
        input.addEventListener('keydown', e => {
          if (e.key === 'Enter') {
            e.preventDefault();
            read();
          }
        });
        input.addEventListener('input', () => {
          kept()[where] = input.value;
          form.save();
        });
        const more =
          where === 'hub'
            ? fettle.parts.hubSearch(form, input, 'data', choose)
            : fettle.parts.upload(
                form,
                path => {
                  input.value = path;
                  choose(path);
                },
                (name, why) => form.wrong('data', name, why),
              );
        fill(
          pick,
          h('span', { class: 'row grow nr-source' }, input, button('Read', null, read), where === 'file' ? more : null),
          where === 'hub' ? more : null,
          columns,
        );
        form.bindError('data', input, err);
      }
    };
    const name = c => (typeof c === 'string' ? c : c.name);
    const mapping = p => {
      const names = (p.columns || []).map(name),
        classify = (p.task || '').includes('classification'),
        image = (p.task || '').startsWith('image');
      const sel = (k, label, auto) => {
        const now = part(k),
          list = now && !names.includes(now) ? [...names, now] : names;
        const s = h(
          'select',
          { class: 'ft-in s ft-sel', 'aria-label': label, onchange: () => tune(k, s.value || null) },
          h('option', { value: '' }, auto ? `${auto} (found)` : 'found by itself'),
          ...list.filter(n => n !== auto || n === now).map(n => h('option', { value: n }, n)),
        );
        s.value = now || '';
        const e = h('span', { role: 'alert' });
        form.bindError('data.' + k, s, e);
        return h('label', { class: 'row' }, h('span', { class: 'dim sm' }, label), s, e);
      };
      if (of(source()) === 'bundled' || !names.length) {
        fill(columns);
        return;
      }
      fill(
        columns,
        image ? null : sel('text', 'Text column', p.text_column),
        classify && !image ? sel('label', 'Label column', p.label_column) : null,
      );
    };
    const show = p => {
      seen = p;
      sub.textContent = p.task || '';
      mapping(p);
      const image = (p.task || '').startsWith('image'),
        lm = p.task === 'causal-lm',
        c = p.counts || {},
        what = lm ? 'passages' : image ? 'images' : 'examples';
      const n = (v, t) => [h('b', { class: 'num ink' }, v), h('span', { class: 'u' }, NB + t)];
      const figures = h(
        'p',
        { class: 'sm mut num nr-counts' },
        c.train !== undefined
          ? h('span', null, ...n(count(c.train), 'train, '), ...n(count(c.evaluation ?? 0), `evaluation ${what}`))
          : null,
        c.tokens ? h('span', null, ...n(short(c.tokens).replace(NB, ' '), 'tokens')) : null,
        c.bytes ? h('span', null, ...n(...bytes(c.bytes).split(NB))) : null,
        !c.bytes && c.characters ? h('span', null, ...n(short(c.characters).replace(NB, ' '), 'characters')) : null,
        c.labels || (p.labels || []).length ? h('span', null, ...n(count(c.labels || p.labels.length), 'labels')) : null,
      );
      const rows = (p.rows || []).slice(0, image ? 10 : 4),
        labelled = !image && rows.some(r => r.label !== undefined),
        cell = v => String(v ?? '').replace(/\s+/g, ' ');
      const table = !rows.length
        ? null
        : image
          ? h(
              'div',
              { class: 'nr-pics' },
              ...rows.map(r => h('figure', null, picture(r), h('figcaption', { class: 'mi dim' }, cell(r.label)))),
            )
          : h(
              'div',
              { class: 'ft-scroll nr-preview', tabindex: 0, role: 'region', 'aria-label': 'First rows' },
              h(
                'table',
                { class: 'ft-table' },
                h(
                  'thead',
                  null,
                  h(
                    'tr',
                    null,
                    h('th', { class: 'r', scope: 'col' }, 'Row'),
                    h('th', { scope: 'col' }, p.text_column || 'text'),
                    labelled ? h('th', { scope: 'col' }, p.label_column || 'label') : null,
                  ),
                ),
                h(
                  'tbody',
                  null,
                  ...rows.map((r, i) =>
                    h(
                      'tr',
                      null,
                      h('td', { class: 'r dim num' }, String(i)),
                      h('td', { class: 'ell', title: cell(r.text) }, cell(r.text)),
                      labelled ? h('td', { class: 'nr-short' }, cell(r.label)) : null,
                    ),
                  ),
                ),
              ),
            );
      const l = p.lengths,
        unit = l ? l.unit : '',
        chart = h('div', { class: 'ft-chart' });
      const hist =
        l && l.counts.length > 1
          ? h(
              'div',
              null,
              h(
                'p',
                { class: 'ft-h' },
                lm ? 'Passage length ' : 'Example length ',
                h(
                  'span',
                  { class: 'sub num' },
                  `mean ${fig(l.mean)}, median ${count(l.median)}, longest ${count(l.longest)} ${unit}`,
                ),
              ),
              chart,
            )
          : null;
      const card = form.boot.data.find(d => d.id === source());
      fill(
        facts,
        figures,
        ...(p.warnings || []).map(w => fettle.form.note('warn', w)),
        table,
        hist,
        card
          ? h(
              'p',
              { class: 'sm mut' },
              card.title ? card.title.replace(/([^.?!])$/, '$1.') + ' ' : '',
              h('a', { href: '/library?data=' + encodeURIComponent(card.id) }, 'Card'),
            )
          : null,
      );
      if (hist) histogram(chart, l, unit);
    };
    /* an image as nested lists, height x width x channels, 0 to 255; larger ones come as their shape only */
    const picture = r => {
      const x = r.image;
      if (!Array.isArray(x) || !Array.isArray(x[0]))
        return h('span', { class: 'mi dim nr-noimg' }, Array.isArray(x) ? x.slice(0, 2).join(' × ') : 'no image');
      const c = h('canvas', { width: x[0].length, height: x.length, role: 'img', 'aria-label': `Image with label ${r.label}` }),
        g = c.getContext('2d'),
        d = g.createImageData(c.width, c.height);
      x.flat().forEach((v, i) => {
        const p = Array.isArray(v) ? v : [v];
        for (let k = 0; k < 3; k++) d.data[4 * i + k] = p[p.length > 2 ? k : 0];
        d.data[4 * i + 3] = 255;
      });
      g.putImageData(d, 0, 0);
      return c;
    };
    const load = async () => {
      const given = {
          source: source(),
          task: form.spec.task || null,
          text: part('text'),
          label: part('label'),
          model: form.spec.model,
        },
        key = JSON.stringify(given);
      if (key === asked || !given.source) return;
      asked = key;
      facts.classList.add('stale');
      const got = await form.server.preview(given);
      if (asked !== key) return;
      facts.classList.remove('stale');
      if (got.error) {
        const e = form.place(got.error),
          path = /^data\.(text|label)$/.test(e.path) && seen ? e.path : 'data';
        form.errors[path] = e.text;
        asked = '';
        form.tell('errors');
        if (path === 'data') {
          fill(facts);
          fill(columns);
          sub.textContent = '';
        }
        return;
      }
      show(got);
    };
    form.on('model', load);
    form.on('all', () => {
      where = of(source());
      if (where !== 'bundled') kept()[where] = source();
      const had = pick.contains(document.activeElement);
      build();
      if (had) pick.querySelector('input, select').focus({ preventScroll: true });
      load();
    });
  };
})();
