"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const root = document.documentElement;

  // The theme: the system's, or the one chosen here, remembered where the browser lets a page remember.
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const remembered = () => { try { return localStorage.getItem("moe-offload-theme"); } catch { return null; } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "theme: " + theme;
  };
  let theme = themes.includes(remembered()) ? remembered() : "auto";
  button.hidden = false;
  show(theme);
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("moe-offload-theme", theme); } catch { /* it lasts as long as the page then */ }
    show(theme);
  });

  // What the pointer is on, in words, below the chart: tooltips come late, and never on a phone.
  const cell = (cells, event) => {
    const { unit, perRow, firstLayer } = cells.closest(".chart").dataset;
    if (!unit) return null;
    const values = cells.dataset.values.split(" ");
    const box = cells.ownerSVGElement.getBoundingClientRect();
    const rows = Math.max(...[...cells.parentElement.querySelectorAll(".cells")].map((each) => each.dataset.values.split(" ").length));
    const row = Math.min(rows - 1, Math.floor(rows * (box.bottom - event.clientY) / box.height));
    if (row < 0 || row >= values.length) return null;
    const layer = Number(firstLayer) + Number(cells.dataset.x);
    const expert = perRow === "1" ? `expert ${row}` : `experts ${row * perRow} to ${(row + 1) * perRow - 1}`;
    if (values[row] === "null") return `layer ${layer}, ${expert}: never asked for`;
    const value = Number(values[row]);
    return `layer ${layer}, ${expert}: ` + (unit === "tokens" ? `${+value.toFixed(1)} tokens` : `${(100 * value).toFixed(1)} % ${unit}`);
  };
  document.querySelectorAll("figure").forEach((figure) => {
    const readout = figure.querySelector(".readout");
    const read = (event) => {
      const part = event.target.closest("g.column, g.cells, .dot, .share-bar rect");
      if (!part) return;
      const words = part.classList.contains("cells") ? cell(part, event) : null;
      readout.textContent = words ?? part.querySelector("title")?.textContent ?? "";
    };
    figure.addEventListener("pointermove", read);
    figure.addEventListener("pointerdown", read);
    figure.addEventListener("pointerleave", () => { readout.textContent = ""; });
  });

  // Residency over time: the slider draws one frame of the report in place of the mean.
  const panel = document.querySelector('.chart[data-chart="heat-residency"]');
  const frames = report.usage.residency ? report.usage.residency.frames : [];
  if (panel && frames.length > 1 && panel.dataset.perRow === "1") {
    const columns = [...panel.querySelectorAll(".cells")];
    const mean = columns.map((column) => column.innerHTML);
    const rows = Math.max(...frames[0].map((layer) => layer.length));
    const draw = (frame) => columns.forEach((column, layer) => {
      if (frame < 0) { column.innerHTML = mean[layer]; return; }
      const paths = {};
      [...frames[frame][layer]].forEach((digit, expert) => {
        const top = 1000 * (1 - (expert + 1) / rows), width = 1000 / columns.length;
        (paths[digit] ??= []).push(`M${layer * width} ${top}h${width}v${1000 / rows}h${-width}z`);
      });
      column.innerHTML = `<title>layer ${layer}</title>` +
        Object.entries(paths).map(([digit, parts]) => `<path class="level-${digit}" d="${parts.join("")}"/>`).join("");
    });
    const controls = document.createElement("div");
    controls.className = "frames";
    controls.innerHTML = '<label for="frame">over time</label><input id="frame" type="range" min="-1" value="-1"><output>mean of the run</output>';
    const [slider, output] = [controls.querySelector("input"), controls.querySelector("output")];
    slider.max = frames.length - 1;
    slider.addEventListener("input", () => {
      const frame = Number(slider.value);
      draw(frame);
      output.textContent = frame < 0 ? "mean of the run" : `from decode token ${report.usage.residency.first_token[frame]}`;
    });
    panel.after(controls);
  }

  const download = document.getElementById("download");
  download.href = URL.createObjectURL(new Blob([JSON.stringify(report)], { type: "application/json" }));
  download.download = "profile.json";
  download.hidden = false;
})();
