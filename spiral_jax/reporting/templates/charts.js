// Draws each figure when it comes near the screen, in the colours of the page, and again when those change.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Set();

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, color: text };
    return { text, axis };
  };

  const layout = (figure) => {
    const { text, axis } = colours();
    const own = figure.layout;
    const title = (of) => ({ ...of, title: { ...of.title, standoff: 8 } });
    return {
      ...own,
      autosize: true, height: 300,
      margin: { l: 52, r: 12, t: 8, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, size: 12, family: getComputedStyle(document.body).fontFamily },
      legend: { orientation: "h", y: -0.24, yanchor: "top", x: 0 },
      hovermode: "x",
      xaxis: { ...title(own.xaxis), ...axis, automargin: true },
      yaxis: { ...title(own.yaxis), ...axis, automargin: true },
    };
  };

  const draw = (box) => {
    const figure = figures[box.dataset.figure];
    Plotly.react(box, figure.data, layout(figure), { responsive: true, displayModeBar: false });
    drawn.add(box);
  };

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || drawn.has(entry.target)) continue;
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "200px" });
  // plotly.js takes longer to start than all the rest, so it waits as text until the page is on the screen.
  const start = () => {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
    document.querySelectorAll(".chart").forEach((box) => watcher.observe(box));
  };
  requestAnimationFrame(() => setTimeout(start));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
})();
