// What both forms of the page have. A source gives the data of latents: `embedded.js` from the page itself, `served.js`
// from the server. It has three functions:
//   text()                  the text that features are looked at in, an array of one row per sequence
//   columns(layer, names)   {name: array} of one row per latent that has a page, ascending; more of them may come
//   row(layer, place)       {name: values} of one such latent
const page = JSON.parse(document.getElementById("data").textContent);
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };
const row = (array, place) => array.values.subarray(place * array.width, (place + 1) * array.width);

// Work that is done once, by a key.
function once(work) {
  const done = new Map();
  return (...key) => {
    const name = key.join("/");
    if (!done.has(name)) done.set(name, work(...key).catch((error) => { done.delete(name); throw error; }));
    return done.get(name);
  };
}
