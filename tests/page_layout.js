// Body of a function that measures a page as it is shown: what a reader would stumble over.
document.querySelectorAll("details").forEach(part => part.open = true);

const shown = element => element.getClientRects().length > 0;
const box = element => element.getBoundingClientRect();
const all = selector => [...document.querySelectorAll(selector)];

const channels = colour => colour.match(/[\d.]+/g).map(Number);
const luminance = colour => channels(colour).slice(0, 3)
  .map(value => value / 255)
  .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
const background = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (channels(colour)[3] !== 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
const contrast = element => {
  const pair = [luminance(getComputedStyle(element).color), luminance(background(element))];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
};

const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = new Set();
while (walker.nextNode()) if (walker.currentNode.data.trim()) found.add(walker.currentNode.parentElement);
const texts = [...found].filter(shown);

const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const overlapping = axis => {
  const boxes = [...axis.children].map(box);
  return boxes.some((one, index) => boxes.slice(index + 1).some(other => overlap(one, other)));
};
const charts = all(".row svg, .curves svg").map(box);

return {
  faintest: texts.map(element => [contrast(element), element.textContent.slice(0, 40)]).sort((a, b) => a[0] - b[0])[0],
  smallest: Math.min(...texts.map(element => parseFloat(getComputedStyle(element).fontSize))),
  outside: all("body *")
    .filter(element => !element.closest(".scroll") && !element.closest("svg") && shown(element))
    .filter(element => box(element).right > innerWidth + 0.5)
    .map(element => element.outerHTML.slice(0, 80)),
  overlapping: all(".ticks, .heights").filter(overlapping).length,
  thin: all(".row .label").filter(element => box(element).width < 120).map(element => element.textContent),
  charts: charts.length,
  drawn: charts.filter(chart => chart.width > 150 && chart.height > 10).length,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  width: document.documentElement.scrollWidth,
  inner: innerWidth,
};
