// Looks at the pages in this page's frames once all of them have loaded (tests/browser.py, which
// puts the paths of the site's files into `files`).

const frames = [...document.querySelectorAll("iframe")];
const address = url => url.href.replace(/#.*/, "");

// Links within the site that lead to no file, or to no place on a page.
function brokenLinks(page, pages) {
  return [...page.links].map(link => new URL(link.href))
    .filter(url => url.origin === location.origin)
    .filter(url => {
      const place = decodeURIComponent(url.hash.slice(1));
      const found = !place || pages.get(address(url))?.getElementById(place);
      return !files.has(decodeURIComponent(url.pathname)) || !found;
    }).map(url => `link leads nowhere: ${url.pathname}${url.hash}`);
}

function missingPictures(page) {
  return [...page.images].filter(image => image.naturalWidth === 0)
    .map(image => `no picture: ${image.src}`);
}

// What was loaded from elsewhere: the site must work without a network.
function foreignFiles(window) {
  return window.performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => new URL(name).protocol !== "data:" && new URL(name).origin !== location.origin)
    .map(name => `loaded from elsewhere: ${name}`);
}

// A box of its own that can be scrolled sideways, between an element and the page.
function inScrollingBox(element, window) {
  for (let box = element; box.tagName !== "ARTICLE"; box = box.parentElement)
    if (["auto", "scroll"].includes(window.getComputedStyle(box).overflowX)
        && box.getBoundingClientRect().right <= window.innerWidth)
      return true;
  return false;
}

function tooWide(page, window) {
  const width = window.innerWidth;
  const found = page.documentElement.scrollWidth > width
    ? [`scrolls sideways: ${page.documentElement.scrollWidth} > ${width}`] : [];
  const cut = [...page.querySelectorAll("article *")].filter(element =>
    element.getBoundingClientRect().right > width && !inScrollingBox(element, window));
  return found.concat(cut.map(element => `cut off: ${element.outerHTML.slice(0, 200)}`));
}

window.addEventListener("load", () => {
  const pages = new Map(frames.map(frame => [frame.src, frame.contentDocument]));
  const found = {};
  for (const frame of frames) {
    const [page, window] = [frame.contentDocument, frame.contentWindow];
    found[frame.getAttribute("src")] = [
      ...(page.querySelector("meta[name=viewport]") ? [] : ["a phone would show it as on a desk"]),
      ...brokenLinks(page, pages), ...missingPictures(page), ...foreignFiles(window),
      ...tooWide(page, window),
    ];
  }
  const result = document.createElement("pre");
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
});
