/* How each figure of the forecast comes about, and by how much earlier runs corrected it. Closed until it is asked for. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h } = fettle.form,
    fill = fettle.replace;
  const FIGURES = [
    ['memory.peak', 'Memory'],
    ['seconds', 'Time'],
    ['trainable', 'Trainable'],
    ['size', 'Size'],
    ['flops', 'Work'],
    ['joules', 'Energy'],
    ['kv', 'KV cache'],
  ];

  fettle.parts.how = form => {
    const list = h('dl', { class: 'ft-why' }),
      corrected = h('p', { class: 'sm mut nr-corrected' }),
      details = h('details', { class: 'nr-more nr-how', hidden: true }, h('summary', {}, 'How these figures come about'), list),
      root = h('div', {}, corrected, details);
    const paint = () => {
      const f = form.forecast,
        how = f && f.derivations;
      details.hidden = corrected.hidden = !how;
      if (!how) return;
      const c = f.calibration || {};
      corrected.hidden = !c.runs;
      if (c.runs && corrected.dataset.text !== c.text) {
        corrected.dataset.text = c.text;
        fill(corrected, c.text[0].toUpperCase() + c.text.slice(1), '. ', h('a', { href: '/plan?view=calibration' }, 'Calibration'));
      }
      fill(list, ...FIGURES.filter(([k]) => how[k]).flatMap(([k, t]) => [h('dt', {}, t), h('dd', {}, how[k])]));
    };
    form.on('forecast', paint).on('all', paint);
    return root;
  };
})();
