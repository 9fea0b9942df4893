"use strict";

// Draws the figures that Python made; the page's colours are laid over them here, because only the
// browser knows whether it is light, dark or paper.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  const PAPER_WIDTH = 680;
  const PLOT_HEIGHT = 270;
  const LEGEND_ROW = 20;
  const LETTER_WIDTH = 6.6;
  const LEGEND_SPARE = 56;
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    doubleClick: "reset",
    // Plotly's own choice has a button that sends the chart to its maker.
    plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  };

  // Plotly gives a horizontal legend columns as wide as its longest name.
  function height(figure, width) {
    if (!figure.layout.showlegend) return PLOT_HEIGHT;
    const longest = Math.max(0, ...figure.data.map((trace) => trace.name.length));
    const columns = Math.max(1, Math.floor(width / (longest * LETTER_WIDTH + LEGEND_SPARE)));
    return PLOT_HEIGHT + Math.ceil(figure.data.length / columns) * LEGEND_ROW;
  }

  function look() {
    const style = getComputedStyle(root);
    const [ink, quiet, line, sheet] = ["--ink", "--quiet", "--line", "--sheet"].map((name) =>
      style.getPropertyValue(name).trim(),
    );
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": ink,
      "font.size": 12,
      "font.family": getComputedStyle(document.body).fontFamily,
      "hoverlabel.bgcolor": sheet,
      "hoverlabel.bordercolor": line,
      "hoverlabel.font.color": ink,
      "xaxis.gridcolor": line,
      "yaxis.gridcolor": line,
      "xaxis.linecolor": quiet,
      "xaxis.showline": true,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": quiet,
      "modebar.activecolor": ink,
    };
  }

  // ``look`` has the dotted names of a change; a first drawing wants objects.
  function dressed(layout) {
    const whole = structuredClone(layout);
    for (const [path, value] of Object.entries(look())) {
      const names = path.split(".");
      const last = names.pop();
      names.reduce((inner, name) => (inner[name] ??= {}), whole)[last] = value;
    }
    return whole;
  }

  function elements() {
    return Object.keys(figures).map((id) => document.getElementById(id));
  }

  function dress(width) {
    for (const element of elements()) {
      const wide = width || element.clientWidth;
      const size = { height: height(figures[element.id], wide), width: width || undefined };
      Plotly.relayout(element, { ...look(), ...size, autosize: !width });
    }
  }

  let following = false;
  function follow(source, change) {
    const range = ["xaxis.range[0]", "xaxis.range[1]"].map((key) => change[key]);
    if (following || range.includes(undefined)) return;
    following = true;
    const others = elements().filter((each) => each !== source && figures[each.id].shares_time);
    Promise.all(others.map((each) => Plotly.relayout(each, { "xaxis.range": range }))).finally(() => {
      following = false;
    });
  }

  const draws = elements().map((element) => {
    const figure = figures[element.id];
    const layout = dressed(figure.layout);
    layout.height = height(figure, element.clientWidth);
    if (touch) {
      // Or a finger that means to scroll the page draws a rectangle.
      layout.dragmode = false;
      layout.xaxis.fixedrange = true;
    }
    return Plotly.newPlot(element, figure.data, layout, CONFIG).then(() => {
      if (figure.shares_time) element.on("plotly_relayout", (change) => follow(element, change));
    });
  });
  Promise.all(draws).then(() => {
    root.dataset.drawn = String(draws.length);
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dress());
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    dress(PAPER_WIDTH);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    dress();
  });
})();
