/* Plan, Calibration: forecast against measurement, run by run, and tables of their ratio. The choices are in the address. */
(() => {
  'use strict';
  const F = fettle,
    { h, segmented, asking } = F.form,
    S = asking(server, ['compared']),
    NB = F.NB,
    BAND = 0.2;
  const root = element.querySelector('.ft');
  const BY = { method: 'Method', model: 'Model', machine: 'Machine' },
    FIGURES = { memory: 'Memory', seconds: 'Time' };
  const asked = (name, known, usual) => (known[F.query.get(name)] ? F.query.get(name) : usual);
  const state = { by: asked('by', BY, 'method'), figure: asked('figure', FIGURES, 'memory') };
  let found = null,
    chart = null,
    hooked = false,
    busy = false;

  /* ---- frame ---- */
  const keep = () =>
    F.query.set({ by: state.by === 'method' ? null : state.by, figure: state.figure === 'memory' ? null : state.figure });
  const pick = segmented('Figure', Object.entries(FIGURES), state.figure, v => {
    state.figure = v;
    keep();
    paint();
  });
  const group = segmented(
    'Rows',
    Object.entries(BY).map(([k, v]) => [k, 'By ' + v.toLowerCase()]),
    state.by,
    v => {
      state.by = v;
      keep();
      tables();
    },
  );
  const sub = h('span', { class: 'sub' }),
    said = h('div', {}),
    plot = h('div', { class: 'cal-chart', tabindex: 0 }),
    legend = h('p', { class: 'ft-legend cal-legend' }),
    grid = h('div', { class: 'ft-scroll' }),
    foot = h('p', { class: 'sm mut cal-foot' }),
    list = h('div', { class: 'ft-scroll cal-list' }),
    how = h('p', { class: 'sm mut cal-how' });
  const panels = h(
    'div',
    { class: 'cal', hidden: true },
    h(
      'section',
      { class: 'ft-panel cal-plot' },
      h('header', { class: 'ft-head' }, h('h2', {}, 'Forecast and measurement'), sub, h('span', { class: 'ft-tools' }, pick)),
      h('div', { class: 'ft-body' }, plot, legend, how),
    ),
    h(
      'section',
      { class: 'ft-panel cal-table' },
      h(
        'header',
        { class: 'ft-head' },
        h('h2', {}, 'Errors'),
        h('span', { class: 'sub' }, 'of the formulas, and of each run corrected by the others alone'),
        h('span', { class: 'ft-tools' }, group),
      ),
      grid,
      foot,
    ),
    h(
      'section',
      { class: 'ft-panel cal-runs' },
      h('header', { class: 'ft-head' }, h('h2', {}, 'Runs'), h('span', { class: 'sub' }, 'forecast / measured')),
      list,
    ),
  );
  F.replace(root, said, panels);

  /* ---- the scatter ---- */
  const shown = () => found.points.filter(p => p[state.figure].measured > 0 && p[state.figure].forecast > 0);
  const scale = () => (state.figure === 'memory' ? 1e9 : 1);
  const words = v => (state.figure === 'memory' ? F.size(v) : F.unit(v, 's'));
  const plain = s => String(s).replace(/[<>&]/g, '');
  const MARKS = { forecast: ['as forecast', 'ink-3'], corrected: ['corrected by the other runs', 'accent'] };
  function reach() {
    const all = shown().flatMap(p => ['forecast', 'corrected', 'measured'].map(k => p[state.figure][k] / scale()));
    return [Math.min(...all) / 1.35, Math.max(...all) * 1.35];
  }
  function fill() {
    const [a, b] = reach(),
      ends = [a, b];
    chart.put('low', ends, ends.map(v => v * (1 - BAND)), {});
    chart.put('high', ends, ends.map(v => v * (1 + BAND)), {});
    chart.put('same', ends, ends, {});
    for (const key of Object.keys(MARKS)) {
      const rows = shown();
      chart.put(
        key,
        rows.map(p => p[state.figure].measured / scale()),
        rows.map(p => p[state.figure][key] / scale()),
        {
          customdata: rows.map(p => p.run),
          text: rows.map(
            p =>
              `<b>${plain(p.name)}</b><br>${plain(p.model)}, ${plain(p.methods.join(' + '))}<br>${words(p[state.figure][key])} ${MARKS[key][0]}, ` +
              `${words(p[state.figure].measured)} measured`,
          ),
        },
      );
    }
  }
  function traces() {
    const line = { width: 0, color: F.token('ink-3') };
    return [
      { key: 'low', mode: 'lines', line, hoverinfo: 'skip' },
      { key: 'high', mode: 'lines', line, fill: 'tonexty', fillcolor: F.alpha(F.token('ink-3'), 0.13), hoverinfo: 'skip' },
      { key: 'same', mode: 'lines', line: { width: 1.25, color: F.token('ink-2') }, hoverinfo: 'skip' },
      ...Object.entries(MARKS).map(([key, [, token]]) => ({
        key,
        mode: 'markers',
        marker: {
          size: key === 'corrected' ? 7 : 8,
          symbol: key === 'corrected' ? 'circle' : 'circle-open',
          color: F.token(token),
          line: { width: 1.5, color: F.token(token) },
        },
        hovertemplate: '%{text}<extra></extra>',
      })),
    ];
  }
  function layout() {
    const unit = state.figure === 'memory' ? 'GB' : 's',
      [a, b] = reach(),
      axis = title => ({
        type: 'log',
        range: [Math.log10(a), Math.log10(b)],
        title: { text: `${title}, ${unit}`, font: { size: 11, color: F.token('ink-3') }, standoff: 6 },
        tickformat: '~g',
        dtick: Math.log10(b / a) > 2 ? 1 : 'D2',
        showgrid: true,
        gridcolor: F.token('grid'),
        minor: { ticks: '', showgrid: false },
      });
    return {
      margin: { l: 54, r: 12, t: 8, b: 40 },
      hovermode: 'closest',
      uirevision: `cal${state.figure}`,
      xaxis: axis('measured'),
      yaxis: axis('forecast'),
    };
  }
  function draw() {
    if (!chart)
      chart = new F.Chart(plot, {
        id: 'calibration',
        clock: false,
        traces,
        layout,
        overlay: () => {
          if (hooked || !chart.host.on) return;
          hooked = true;
          chart.host.on('plotly_click', e => {
            const run = e.points?.[0]?.customdata;
            if (run) F.go('/live', { run });
          });
        },
      });
    chart.zoom = null;
    chart.full.clear();
    fill();
    const s = found.overall[state.figure];
    plot.setAttribute(
      'aria-label',
      `${FIGURES[state.figure]}, forecast against measured, of ${shown().length} runs; median error ${F.percent(s.before.error)} before and ` +
        `${F.percent(s.after.error)} after correction. The runs are listed below.`,
    );
    chart.rebuild();
    F.replace(
      legend,
      Object.values(MARKS).map(([text, token], i) =>
        h(
          'span',
          {},
          h('i', { class: i ? 'cal-dot full' : 'cal-dot', style: `--c: var(--ft-${token})` }),
          text,
        ),
      ),
      h('span', {}, h('i', { class: 'cal-band' }), `within ${NB}${100 * BAND}${NB}%`),
      h('span', { class: 'mut' }, 'Click a point to open its run.'),
    );
  }

  /* ---- the tables ---- */
  const ratio = s => (s ? `× ${s.ratio.toFixed(2)}` : ''),
    share = v => `${Math.round(100 * v)}${NB}%`,
    error = s => (s ? `${share(s.error)} (${share(s.error90)})` : ''),
    inside = s => (s ? share(s.within20) : '');
  function tables() {
    const columns = [
      { name: BY[state.by] },
      { name: 'Runs', r: 1 },
      { name: 'Forecast / measured', r: 1 },
      { name: 'Error, median (90 %)', r: 1 },
      { name: 'Within 20 %', r: 1 },
      { name: 'Corrected', r: 1 },
      { name: 'Error, median (90 %)', r: 1 },
      { name: 'Within 20 %', r: 1 },
    ];
    const cells = r => {
      const { before, after } = r[state.figure];
      return [r.key, r.n, ratio(before), error(before), inside(before), ratio(after), error(after), inside(after)];
    };
    F.replace(grid, F.table(columns, [...found.by[state.by], { key: 'All', ...found.overall }].map(cells)));
    grid.querySelector('tbody tr:last-child')?.classList.add('cal-all');
    const [t, tn] = found.overall.trainable_exact,
      [z, zn] = found.overall.size_exact;
    F.text(foot, `Counted, not estimated: trainable parameters exact in ${t} of ${tn} runs, size on disk in ${z} of ${zn}. ${found.said}`);
  }
  function runs() {
    const columns = [
      { name: 'Run', f: p => h('a', { href: `/live?run=${p.run}` }, p.name) },
      { name: 'Model' },
      { name: 'Methods' },
      { name: 'Measured', r: 1 },
      { name: 'Forecast', r: 1 },
      { name: 'Ratio', r: 1 },
      { name: 'Corrected', r: 1 },
      { name: 'Ratio', r: 1 },
    ];
    F.replace(
      list,
      F.table(
        columns,
        shown().map(p => {
          const f = p[state.figure];
          return [
            p,
            p.model,
            p.methods.join(' + '),
            words(f.measured),
            words(f.forecast),
            (f.forecast / f.measured).toFixed(2),
            words(f.corrected),
            (f.corrected / f.measured).toFixed(2),
          ];
        }),
      ),
    );
  }

  /* ---- all of it ---- */
  function paint() {
    panels.hidden = !found.runs;
    if (!found.runs) {
      F.note(said, 'info', `No finished run to compare with yet. Each run that finishes adds its measured memory and time. ${found.said}`);
      return;
    }
    F.replace(said);
    pick.set(state.figure);
    F.text(sub, `${found.runs} finished ${found.runs === 1 ? 'run' : 'runs'}`);
    F.text(how, found.how);
    draw();
    tables();
    runs();
  }
  async function refresh() {
    if (busy) return;
    busy = true;
    const answer = await S.compared({});
    busy = false;
    if (answer.error) {
      if (!found) F.note(said, 'bad', answer.error.text);
      return;
    }
    found = answer;
    paint();
  }
  addEventListener('fettle-view', e => e.detail === 'calibration' && refresh());
  addEventListener('fettle-changed', () => found && refresh());
  if (F.query.get('view') === 'calibration') refresh();
})();
