/* The New run page: puts the panels together and decides with which spec they open. */
(() => {
  'use strict';
  const { h, sentence, note, asking } = fettle.form,
    parts = fettle.parts,
    fill = fettle.replace;
  const CALLS = ['boot', 'plan', 'profile', 'preview', 'costs', 'start', 'clone', 'preset', 'save_preset', 'as_text', 'probe', 'probe_state', 'probe_cancel', 'hub', 'upload'];

  async function mount(element, server) {
    const root = element.querySelector('.nr') || element,
      $ = s => root.querySelector(s);
    const form = new parts.Form(server, root);
    fettle.newRun = form;
    const boot = await server.boot({}, { retry: true });
    if (boot.error) {
      fill($('.nr-title'), h('h1', null, 'New run'));
      $('.nr-title').after(note('bad', sentence(boot.error)));
      return form;
    }
    form.boot = boot;
    const q = new URLSearchParams(location.search),
      draft = form.draft();
    form.view = (draft && draft.view) || {};
    parts.titleRow(form, $('.nr-title'));
    parts.modelPicker(form, $('.nr-model'));
    parts.dataPicker(form, $('.nr-data'));
    parts.pipeline(form, $('.nr-pipe'));
    parts.methodCards(form, $('.nr-methods'));
    parts.budget(form, $('.nr-budget'));
    parts.actions(form, $('.ft-cta'), $('.ft-dock'));

    let spec = null,
      typed = {},
      lines = '';
    const clone = q.get('clone'),
      preset = q.get('preset');
    const whole = q.get('spec');
    if (whole) {
      try {
        spec = JSON.parse(whole);
        form.view.preset = '';
        lines = 'Settings of the recommended pipeline.';
        form.view.named = false;
      } catch (e) {
        lines = 'The settings in the address cannot be read.';
      }
    } else if (clone) {
      const got = await server.clone({ run: clone });
      if (got.error) lines = sentence(got.error);
      else {
        spec = got.spec;
        form.parent = got.run;
        form.view.preset = '';
        lines = `Settings of ${got.name}.`;
        form.view.named = false;
      }
    } else if (preset) {
      const got = await server.preset({ name: preset });
      if (got.error) lines = sentence(got.error);
      else {
        spec = got.spec;
        form.view.preset = preset;
      }
    }
    if (!spec && draft && draft.spec && draft.spec.model !== undefined) {
      spec = draft.spec;
      typed = draft.typed || {};
    }
    if (!spec) {
      spec = structuredClone(boot.spec);
      form.view.preset = boot.preset;
    }
    if (!form.view.named || !spec.name) {
      spec = { ...spec, name: boot.name };
      form.view.named = false;
    }
    form.replace(spec, typed);
    if (typed === (draft || {}).typed) Object.assign(form.errors, draft.errors || {});
    /* a method, with fields as on the command line: lora:dora=true,rank=8 */
    const [, add, given] = /^([^:]*):?(.*)$/s.exec(q.get('method') || ''),
      m = add && form.method(add);
    if (m && (given || !form.spec.pipeline.some(s => s.method === add))) {
      const there = form.spec.pipeline.findIndex(s => s.method === add),
        at = there < 0 ? form.addStage(add) : there;
      for (const [name, text] of given ? given.split(',').map(p => p.split('=')) : []) {
        const field = m.hyperparameters.find(f => f.name === name),
          flag = { true: true, false: false }[text];
        if (field && text) form.set(`pipeline.${at}.${name}`, flag ?? (typeof field.default === 'number' && text !== 'auto' ? Number(text) : text), 'pipeline');
      }
      lines = there < 0 ? `${m.name} added to the pipeline.` : `${m.name} is stage ${at + 1}, its settings as asked for.`;
    } else if (add && form.switch(add)) {
      const on = form.get('training.switches') || [];
      if (!on.some(s => s.method === add)) form.set('training.switches', [...on, form.complete({ method: add })]);
      form.view.switches = true;
      form.tell('pipeline');
      lines = form.spec.pipeline.some(s => (form.method(s.method) || {}).trains)
        ? `${form.switch(add).name} is switched on.`
        : `${form.switch(add).name} is switched on; it acts in stages that train, and there is none yet.`;
    } else if (add && !form.method(add)) lines = `There is no method called ${add}.`;
    for (const [key, field] of [
      ['model', 'model'],
      ['data', 'data'],
    ])
      if (q.get(key)) {
        form.set(field, q.get(key));
        form.tell('all');
      }
    if (whole || clone || preset || add || q.get('model') || q.get('data')) {
      // The address forgets what it asked for, so the draft must know it first: the page may be mounted once more.
      form.keep();
      history.replaceState(null, '', location.pathname);
    }
    if (lines) form.status(lines);
    form.tell('errors');
    root.removeAttribute('aria-busy');
    return form;
  }
  mount(element, asking(server, CALLS));
})();
