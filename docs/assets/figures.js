// Figures of notebooks are drawn when they are about to be seen.
const drawn = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    drawn.unobserve(entry.target);
    const figure = JSON.parse(entry.target.querySelector("script").textContent);
    Plotly.newPlot(entry.target, figure.data, figure.layout, { responsive: true, displayModeBar: false, ...figure.config });
    if (figure.frames) Plotly.addFrames(entry.target, figure.frames);
  }
}, { rootMargin: "400px" });
document.querySelectorAll(".figure").forEach((figure) => drawn.observe(figure));
