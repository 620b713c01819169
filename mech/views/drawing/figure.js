// Only in pages for papers: leaves the height of the page, and all that is on it as one SVG, in <pre id="figure">.
(() => {
  const pairs = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap",
    "opacity", "font-family", "font-size", "font-weight", "text-anchor", "dominant-baseline", "vector-effect", "paint-order",
    "filter"];
  const tag = (name, facts, inner = "") =>
    `<${name}${Object.entries(facts).map(([k, v]) => ` ${k}="${String(v).replace(/&/g, "&amp;").replace(/"/g, "&quot;")
      .replace(/</g, "&lt;")}"`).join("")}>${inner}</${name}>`;
  const text = words => words.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const seen = box => box.width > 0 && box.height > 0;
  const opaque = colour => colour && colour !== "transparent" && !/, 0\)$/.test(colour);

  // A drawing of ours: a copy in which every style is an attribute, since the sheet stays behind.
  const copied = svg => {
    const copy = svg.cloneNode(true), box = svg.getBoundingClientRect();
    const from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((element, i) => {
      const style = getComputedStyle(element);
      if (style.display === "none") return to[i].setAttribute("display", "none");
      pairs.forEach(name => style.getPropertyValue(name) && to[i].setAttribute(name, style.getPropertyValue(name)));
      ["class", "style", "data-tip", "tabindex"].forEach(name => to[i].removeAttribute(name));
    });
    Object.entries({ x: box.x, y: box.y + scrollY, width: box.width, height: box.height })
      .forEach(([name, value]) => copy.setAttribute(name, value));
    return new XMLSerializer().serializeToString(copy);
  };
  // A line of text for each line it was broken into.
  const lines = node => {
    const range = document.createRange(), style = getComputedStyle(node.parentElement), found = [];
    for (const part of node.data.matchAll(/\S+/g)) {
      range.setStart(node, part.index);
      range.setEnd(node, part.index + part[0].length);
      const box = range.getBoundingClientRect(), last = found.at(-1);
      if (!seen(box)) continue;
      if (last && Math.abs(last.box.y - box.y) < 2) last.words += " " + part[0];
      else found.push({ words: part[0], box });
    }
    return found.map(({ words, box }) => tag("text", {
      x: box.x, y: box.y + scrollY + box.height * .8, fill: style.color, "font-family": style.fontFamily,
      "font-size": style.fontSize, "font-weight": style.fontWeight, "font-style": style.fontStyle }, text(words))).join("");
  };
  const painted = async element => {
    const box = element.getBoundingClientRect();
    if (!seen(box)) return "";
    const place = { x: box.x, y: box.y + scrollY, width: box.width, height: box.height };
    if (element.matches(".plot")) {
      const svg = await Plotly.toImage(element, { format: "svg", width: box.width, height: box.height, imageDataOnly: true });
      return `<g transform="translate(${place.x} ${place.y})">${svg}</g>`;
    }
    if (element.localName === "svg") return copied(element);
    if (element.localName === "canvas") return tag("image", { ...place, href: element.toDataURL() });
    const style = getComputedStyle(element), picture = /^url\("(.*)"\)$/.exec(style.backgroundImage);
    let out = "";
    if (picture) out += tag("image", { ...place, href: picture[1], preserveAspectRatio: "none", filter: style.filter });
    else if (/gradient/.test(style.backgroundImage)) {
      const id = `bar-${Math.round(place.x)}-${Math.round(place.y)}`;
      const colours = style.backgroundImage.match(/rgba?\([^)]*\)|color\([^)]*\)/g);
      out += tag("linearGradient", { id }, colours.map((colour, i) =>
        tag("stop", { offset: i / (colours.length - 1), "stop-color": colour })).join(""));
      out += tag("rect", { ...place, fill: `url(#${id})` });
    } else if (opaque(style.backgroundColor))
      out += tag("rect", { ...place, rx: parseFloat(style.borderTopLeftRadius) || 0, fill: style.backgroundColor });
    if (parseFloat(style.borderBottomWidth) && opaque(style.borderBottomColor))
      out += tag("rect", { ...place, y: place.y + place.height - 1, height: 1, fill: style.borderBottomColor });
    for (const child of element.childNodes) {
      if (child.nodeType === Node.TEXT_NODE) out += lines(child);
      else if (child.nodeType === Node.ELEMENT_NODE && getComputedStyle(child).display !== "none"
        && !child.matches("script, style")) out += await painted(child);
    }
    return out;
  };
  addEventListener("load", () => setTimeout(async () => {
    const main = document.querySelector("main"), height = Math.ceil(main.getBoundingClientRect().bottom + scrollY);
    const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${innerWidth}" height="${height}" `
      + `viewBox="0 0 ${innerWidth} ${height}"><rect width="100%" height="100%" fill="#fff"/>${await painted(main)}</svg>`;
    const left = document.createElement("pre");
    left.id = "figure";
    left.hidden = true;
    left.textContent = JSON.stringify({ height, svg });
    document.body.append(left);
  }, 3000));
})();
