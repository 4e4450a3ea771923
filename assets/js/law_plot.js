/* What a law answers, drawn: points, fitted line, interval, the predicted point. One Plotly chart for all laws.

   const plot = new fettle.LawPlot(node, legend);
   plot.show(plot)   // {x: {title, unit, log}, y: ..., series: [{name, kind: points | line | thin | band | mark, x, y, low, high, labels}]} */
(() => {
  'use strict';
  const F = window.fettle;
  const axisName = a => a.title + (a.unit ? `, ${a.unit}` : '');
  const plain = s => String(s).replace(/[<>&]/g, '');

  F.LawPlot = class {
    constructor(node, legend) {
      Object.assign(this, { node, legend, plot: null, times: 0 });
      F.onTheme(() => this.plot && this.key());
    }
    /* curves that belong together (a run's points and its fit) share a colour */
    color(s) {
      if (s.kind === 'band' || s.kind === 'line') return F.token('accent');
      if (s.kind === 'mark') return F.token('ink');
      const owner = s.name.split(',')[0],
        owners = [...new Set(this.plot.series.filter(o => o.small).map(o => o.name.split(',')[0]))],
        i = owners.indexOf(owner);
      return i < 0 || owners.length < 2 ? F.token(s.kind === 'thin' ? 'ink-3' : 'ink-2') : F.token(`run-${(i % 10) + 1}`);
    }
    show(plot) {
      this.plot = plot;
      this.times++;
      if (!this.chart)
        this.chart = new F.Chart(this.node, {
          id: 'law',
          aria: 'Prediction',
          clock: false,
          traces: () => this.traces(),
          layout: () => this.layout(),
        });
      this.chart.zoom = null;
      this.chart.full.clear();
      for (const [i, s] of plot.series.entries()) {
        if (s.kind === 'band') {
          this.chart.put(`s${i}l`, s.x, s.low, {});
          this.chart.put(`s${i}h`, s.x, s.high, {});
        } else {
          const more = {};
          if (s.kind === 'mark' && F.finite(s.low?.[0]) && F.finite(s.high?.[0])) {
            more['error_y.array'] = [s.high[0] - s.y[0]];
            more['error_y.arrayminus'] = [s.y[0] - s.low[0]];
          }
          if (s.labels) more.text = s.labels.map(plain);
          this.chart.put(`s${i}`, s.x, s.y, more);
        }
      }
      this.node.setAttribute(
        'aria-label',
        `${axisName(plot.y)} over ${axisName(plot.x)}: ${plot.series.map(s => s.name).join(', ')}. The figures are in the table below.`,
      );
      this.chart.rebuild();
      this.key();
    }
    traces() {
      const out = [];
      for (const [i, s] of this.plot.series.entries()) {
        const color = this.color(s),
          hover = `${plain(s.name)}<br>%{x:.4~g}: %{y:.4~g}<extra></extra>`;
        if (s.kind === 'band')
          out.push(
            { key: `s${i}l`, mode: 'lines', line: { width: 0, color }, hoverinfo: 'skip' },
            {
              key: `s${i}h`,
              mode: 'lines',
              line: { width: 0, color },
              fill: 'tonexty',
              fillcolor: F.alpha(color, 0.16),
              hoverinfo: 'skip',
            },
          );
        else if (s.kind === 'line' || s.kind === 'thin')
          out.push({
            key: `s${i}`,
            mode: 'lines',
            line: { color, width: s.kind === 'line' ? 2 : 1.25, dash: s.kind === 'thin' ? 'dot' : 'solid' },
            hovertemplate: hover,
          });
        else if (s.kind === 'points')
          out.push({
            key: `s${i}`,
            mode: 'markers',
            marker: { color: s.small ? F.alpha(color, 0.55) : color, size: s.small ? 4 : 7, symbol: 'circle' },
            hovertemplate: s.labels ? `<b>%{text}</b><br>%{x:.4~g}: %{y:.4~g}<extra></extra>` : hover,
          });
        else
          out.push({
            key: `s${i}`,
            mode: 'markers',
            marker: { color: F.token('panel'), size: 10, symbol: 'diamond', line: { color, width: 2 } },
            error_y: { type: 'data', symmetric: false, color, thickness: 1.5, width: 5 },
            hovertemplate: hover,
          });
      }
      return out;
    }
    layout() {
      const axis = (a, more) => ({
        title: { text: axisName(a), font: { size: 11, color: F.token('ink-3') }, standoff: 6 },
        type: a.log ? 'log' : 'linear',
        tickformat: a.unit === 'FLOP' ? '.0e' : a.log ? '~s' : '~g',
        dtick: a.log ? this.decades(a) : undefined,
        showgrid: true,
        gridcolor: F.token('grid'),
        minor: { ticks: '', showgrid: false },
        ...more,
      });
      return {
        margin: { l: 58, r: 16, t: 10, b: 40 },
        hovermode: 'closest',
        uirevision: `law${this.times}`,
        xaxis: axis(this.plot.x),
        yaxis: axis(this.plot.y),
      };
    }
    /* at most about six labels; below two decades Plotly's own choice, which names the steps between */
    decades(a) {
      const which = a === this.plot.x ? ['x'] : ['y', 'low', 'high'],
        all = this.plot.series.flatMap(s => which.flatMap(k => s[k] || [])).filter(v => F.finite(v) && v > 0),
        span = Math.log10(Math.max(...all) / Math.min(...all));
      return span > 2 ? Math.ceil(span / 6) : 'D2';
    }
    key() {
      F.replace(
        this.legend,
        this.plot.series.map(s => {
          const color = this.color(s),
            mark = F.svg('svg', { width: 18, height: 10, viewBox: '0 0 18 10', 'aria-hidden': 'true' });
          if (s.kind === 'band') mark.append(F.svg('rect', { x: 0, y: 0, width: 18, height: 10, fill: color, opacity: 0.25 }));
          else if (s.kind === 'points') mark.append(F.svg('circle', { cx: 9, cy: 5, r: 3.5, fill: color }));
          else if (s.kind === 'mark')
            mark.append(F.svg('path', { d: 'M9 0 14 5 9 10 4 5Z', fill: 'none', stroke: color, 'stroke-width': 1.75 }));
          else
            mark.append(
              F.svg('path', {
                d: 'M0 5H18',
                stroke: color,
                'stroke-width': s.kind === 'line' ? 2 : 1.25,
                'stroke-dasharray': s.kind === 'thin' ? '2 2' : null,
              }),
            );
          return F.el('span', {}, mark, s.name);
        }),
      );
    }
  };
})();
