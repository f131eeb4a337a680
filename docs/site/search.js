// Sphinx's own weights; a page whose title begins with the words comes before a class of that name,
// and pages that mention everything come after those that explain it.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, title, , , found]) => {
    const score = ["index", "changelog", "contributing"].includes(page) ? found - 3 : found;
    const words = new URLSearchParams(location.search).get("q") || "";
    const begins = words && title.toLowerCase().startsWith(words.trim().toLowerCase());
    return begins ? score + 100 : score;
  },
};
