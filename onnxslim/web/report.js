"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const before = "var(--before)", after = "var(--after)";
  const style = "font-size: 13px; overflow: visible";
  const MOST = 40;

  // Tables: a click on a heading sorts by it, a second one the other way round.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, k) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") !== "descending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const value = (row) => {
          const cell = row.cells[k];
          return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
        };
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (typeof x !== typeof y) return typeof x === "string" ? 1 : -1; // cells without a number come last
          const ascending = typeof x === "number" ? x - y : x.localeCompare(y);
          return falling ? -ascending : ascending;
        };
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      });
    });
  }

  // Plots: each figure names what it shows; it is drawn again when its width changes.
  const tail = (text, most) => (text.length > most ? "…" + text.slice(1 - most) : text);
  const narrow = (width) => width < 600;

  // One bar inside the other: wide for the original, narrow for the result. Names stand in front of the bars, and above
  // them where the screen is narrow: what tells names apart would not fit beside a bar.
  function bars(width, items, first, second, label, form) {
    const above = narrow(width) ? 20 : 0;
    const most = above ? Math.floor((width - 16) / 7.6) : 44;
    const longest = Math.max(0, ...items.map((d) => Math.min(most, d.layer.length)));
    const bar = (value, fill, inset) => Plot.barX(items.filter((d) => value(d) != null), { x: value, y: "layer", fill, insetTop: above + inset, insetBottom: inset });
    return Plot.plot({
      width, style, height: 70 + (26 + above) * items.length, marginRight: 24, marginBottom: 40,
      marginLeft: above ? 8 : 16 + 7.6 * longest,
      x: { label, grid: true, nice: true, ticks: Math.max(3, Math.round(width / 130)), tickFormat: form },
      y: { label: null, domain: items.map((d) => d.layer), axis: above ? null : "left", tickFormat: (d) => tail(d, most) },
      marks: [
        bar(first, before, 2), bar(second, after, 8), Plot.ruleX([0]),
        above ? Plot.text(items, { x: 0, y: "layer", text: (d) => tail(d.layer, most), textAnchor: "start", dx: 3, dy: -11 }) : null,
      ],
    });
  }

  // Models that a label fits beside, those of the front first: none lies where the label of another one begins.
  function apart(models, front, width) {
    const wide = d3.max(models, (d) => d.ms) || 1, [low, high] = d3.extent(models, (d) => d.quality);
    const place = (d) => [(d.ms / wide) * (width - 200), ((d.quality - low) / (high - low || 1)) * 240];
    const kept = [];
    for (const d of [...models].sort((a, b) => (b === models[0]) - (a === models[0]) || front.includes(b) - front.includes(a))) {
      const [x, y] = place(d);
      if (kept.every((k) => Math.abs(place(k)[0] - x) > 110 || Math.abs(place(k)[1] - y) > 16)) kept.push(d);
    }
    return kept;
  }

  const draw = {
    latency(width) {
      const items = data.bench.flatMap((row) => [
        { ep: row.ep, which: "original", ...row.original_latency_ms },
        { ep: row.ep, which: "result", ...row.latency_ms },
      ]);
      return Plot.plot({
        width, style, height: 80 + 64 * data.bench.length, marginLeft: 64, marginBottom: 40, marginRight: narrow(width) ? 90 : 160,
        fy: { label: null }, y: { label: null, domain: ["original", "result"] }, x: { label: "ms →", grid: true, zero: true },
        marks: [
          Plot.ruleY(items, { fy: "ep", y: "which", x1: "p10", x2: "p90", strokeWidth: 4, stroke: (d) => (d.which === "result" ? after : before) }),
          Plot.dot(items, { fy: "ep", y: "which", x: "median", r: 6, fill: (d) => (d.which === "result" ? after : before) }),
        ],
      });
    },
    speed(width) {
      return Plot.plot({
        width, style, height: 70 + 36 * data.bench.length, marginRight: 60, marginBottom: 40,
        marginLeft: 20 + 8 * Math.max(...data.bench.map((d) => d.ep.length)),
        x: { label: "times as fast as the original →", grid: true }, y: { label: null },
        marks: [
          Plot.ruleX([1], { strokeDasharray: "4 4" }),
          Plot.ruleY(data.bench, { y: "ep", x1: (d) => d.interval[0], x2: (d) => d.interval[1], strokeWidth: 4, stroke: after }),
          Plot.dot(data.bench, { y: "ep", x: "speedup", r: 6, fill: after }),
          Plot.text(data.bench, { y: "ep", x: (d) => d.interval[1], dx: 8, textAnchor: "start", text: (d) => d.speedup.toFixed(2) + "x" }),
        ],
      });
    },
    pareto(width) {
      const models = data.details.models;
      const front = [];
      for (const d of [...models].sort((a, b) => a.ms - b.ms || b.quality - a.quality)) {
        if (!front.length || d.quality > front[front.length - 1].quality) front.push(d);
      }
      return Plot.plot({
        width, style, height: 340, marginLeft: 64, marginBottom: 40, marginRight: narrow(width) ? 100 : 200, marginTop: 28,
        x: { label: "ms for one pass →", grid: true, zero: true, nice: true },
        y: { label: "↑ " + data.details.quality, grid: true, nice: true, inset: 16 },
        marks: [
          Plot.lineY(front, { x: "ms", y: "quality", stroke: after, strokeWidth: 2, curve: "step-after" }),
          Plot.dot(models, { x: "ms", y: "quality", r: 6, fill: (d) => (front.includes(d) ? after : before) }),
          Plot.text(apart(models, front, width), { x: "ms", y: "quality", text: (d) => tail(d.name, narrow(width) ? 14 : 30), dx: 10, dy: -8, textAnchor: "start" }),
        ],
      });
    },
    layers(width, choice) {
      const measure = choice.measure || "macs";
      const labels = { ms: "ms on the CPU", macs: "multiply-accumulates", bytes: "bytes of weights", bits: "bits of a stored weight", channels: "channels of the output" };
      const weight = (d) => Math.max((d.before || {})[measure] || 0, (d.after || {})[measure] || 0);
      let items = data.details.layers;
      if (items.length > MOST) items = [...items].sort((a, b) => weight(b) - weight(a)).slice(0, MOST);
      return bars(width, items, (d) => d.before && d.before[measure], (d) => d.after && d.after[measure], labels[measure] + " →",
        ["macs", "bytes"].includes(measure) ? "~s" : undefined);
    },
    errors(width) {
      let items = data.details.errors;
      if (items.length > MOST) items = [...items].sort((a, b) => b.error - a.error).slice(0, MOST);
      return bars(width, items, (d) => d.error, (d) => d.added, "share of the spread →", "~%");
    },
    histogram(width, choice) {
      const found = data.details.histograms[Number(choice.layer || 0)];
      const bins = (h) => {
        const step = (h.high - h.low) / Math.max(1, h.counts.length), total = d3.sum(h.counts) || 1;
        return h.counts.map((n, k) => ({ x1: h.low + k * step, x2: h.low + (k + 1) * step, y: n / total / (step || 1) }));
      };
      const old = found.before ? bins(found.before) : [], made = found.after ? bins(found.after) : [];
      return Plot.plot({
        width, style, height: 280, marginLeft: 56, marginBottom: 40,
        x: { label: "value →" }, y: { label: "↑ density", grid: true },
        marks: [
          Plot.rectY(old, { x1: "x1", x2: "x2", y: "y", fill: before, inset: 0 }),
          Plot.lineY(made, { x: "x1", y: "y", stroke: after, strokeWidth: 2, curve: "step-after" }),
          Plot.ruleY([0]),
        ],
      });
    },
  };

  for (const figure of document.querySelectorAll("figure[data-plot]")) {
    const place = figure.querySelector(".plot");
    const selects = [...figure.querySelectorAll("select")];
    let drawn = 0;
    const paint = () => {
      const width = Math.round(place.clientWidth);
      if (!width) return;
      drawn = width;
      const choice = Object.fromEntries(selects.map((s) => [s.name, s.value]));
      const plot = draw[figure.dataset.plot](Math.min(width, 1100), choice);
      plot.setAttribute("role", "img");
      const shown = selects.map((s) => s.selectedOptions[0].textContent);
      plot.setAttribute("aria-label", [figure.querySelector("figcaption").textContent, ...shown].join(": "));
      place.replaceChildren(plot);
    };
    for (const select of selects) select.addEventListener("change", paint);
    paint();
    new ResizeObserver(() => { if (Math.abs(place.clientWidth - drawn) > 4) requestAnimationFrame(paint); }).observe(place);
  }

  window.addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
  document.documentElement.dataset.ready = "yes";
})();
