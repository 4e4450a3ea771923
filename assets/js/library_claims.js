/* What a paper says of a method, beside what was measured here. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h } = fettle.form;
  const LOOK = { reproduced: 'yes', 'within noise': 'noise', 'not reproduced': 'no', 'not comparable': 'na' };
  const capital = t => t.charAt(0).toUpperCase() + t.slice(1);

  fettle.parts.claimCards = rows =>
    rows.length
      ? h(
          'section',
          { class: 'ft-panel', 'aria-label': 'Claims' },
          h(
            'header',
            { class: 'ft-head' },
            h('h2', null, 'Claims'),
            h('span', { class: 'sub' }, 'the paper beside what was measured'),
          ),
          h(
            'div',
            { class: 'ft-body lib-claims' },
            ...rows.map(r =>
              h(
                'article',
                { class: 'ft-claim' },
                h(
                  'div',
                  { class: 'head' },
                  h('h3', { class: 'grow' }, r.says),
                  r.verdict ? fettle.verdict(LOOK[r.verdict], capital(r.verdict)) : h('span', { class: 'ft-tag' }, 'Not checked yet'),
                ),
                r.verdict ? h('p', { class: 'sm' }, r.sentence) : null,
                r.verdict && r.verdict !== 'not comparable'
                  ? h('p', { class: 'sm mut' }, r.date ? `Measured by the makers of Fettle on ${r.date}: ${r.machine}.` : 'Measured on this machine.')
                  : null,
                r.setting ? h('p', { class: 'sm mut' }, h('b', null, 'Here: '), r.setting + '.') : null,
                r.differs ? h('p', { class: 'sm mut' }, h('b', null, 'Unlike the paper: '), r.differs + '.') : null,
              ),
            ),
            h(
              'p',
              { class: 'sm mut' },
              'Check them with ',
              h('code', { class: 'ft-code' }, `python -m workbench claims ${rows[0].method}`),
              ', about three minutes each.',
            ),
          ),
        )
      : null;
})();
